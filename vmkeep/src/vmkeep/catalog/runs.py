"""Every run in the catalog, the failed ones too."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from sqlite3 import Row

from backupcore.errors import storable
from backupcore.model import BackupRun, Image, Increment, RunState
from backupcore.session import Recorded
from vmkeep.catalog import images, rows, tokens
from vmkeep.catalog.database import HINT, Catalog

__all__ = ["PastRun", "begin", "died", "fail", "failed_points", "increment_of", "last", "reads", "record", "settle"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PastRun:
    """One run as it was. `state` is running, recorded, failed or cancelled; `error_class` and `error` say why.

    `type` is None for a run that is no backup; `phase` how far one came that was not recorded, where that is known.
    """

    id: str
    kind: str
    datastore: str
    type: str | None
    started: datetime
    ended: datetime | None
    state: str
    phase: str | None
    image: int | None
    increment: int | None
    error_class: str | None
    error: str | None


def _now() -> str:
    return datetime.now(UTC).isoformat()


def begin(catalog: Catalog, run: BackupRun) -> None:
    """Write down that a run begins."""
    with catalog.writing() as connection:
        connection.execute(
            "INSERT INTO runs (id, vm_uuid, vm_name, datastore, type, started, state, installation, kind, phase, point)"
            " VALUES (?, ?, ?, ?, ?, ?, 'running', ?, 'backup', 'prepare', ?)",
            (
                run.id,
                run.vm.uuid,
                run.vm.name,
                run.datastore,
                run.type.value,
                _now(),
                run.installation or None,
                run.point,
            ),
        )


def reads(catalog: Catalog, run: str) -> None:
    """Write down that a run has fixed its instant, and that its disks are read from now on."""
    with catalog.writing() as connection:
        connection.execute("UPDATE runs SET phase = 'backup' WHERE id = ? AND state = 'running'", (run,))


def record(catalog: Catalog, recorded: Recorded, *, driver: str = "") -> int:
    """Write the increment and the end of its run down, both or neither; returns the image's number.

    ContractViolation, which names the `driver`, if its source is that of another run.
    """
    with catalog.writing() as connection:
        tokens.require_new(connection, recorded.run.datastore, driver, recorded.increment.source)
        number = images.record(connection, recorded)
        increment = recorded.increment
        connection.execute(
            "UPDATE runs SET ended = ?, state = ?, phase = NULL, type = ?, image = ?, increment = ? WHERE id = ?",
            (_now(), RunState.RECORDED.value, increment.type.value, number, increment.id, recorded.run.id),
        )
    return number


def fail(catalog: Catalog, run: str, state: RunState, *, kind: str, error: str, traceback: str = "") -> None:
    """Write down how a run ended that was not recorded. A recorded one stays recorded."""
    with catalog.writing() as connection:
        connection.execute(
            "UPDATE runs SET ended = ?, state = ?, error_class = ?, error = ?, traceback = ?"
            " WHERE id = ? AND state = 'running'",
            (_now(), state.value, kind, storable(error), storable(traceback) or None, run),
        )


def died(catalog: Catalog, vm: str) -> list[str]:
    """Of this VM's runs (by UUID), those that still count as running were killed; the caller holds the VM's lock.

    Returns their IDs.
    """
    with catalog.writing() as connection:
        query = "SELECT id FROM runs WHERE vm_uuid = ? AND state = 'running' ORDER BY rowid"
        found = [row["id"] for row in connection.execute(query, (vm,))]
        connection.execute(
            "UPDATE runs SET state = ?, error_class = 'Killed', error = 'the process was killed'"
            " WHERE vm_uuid = ? AND state = 'running'",
            (RunState.FAILED.value, vm),
        )
    return found


def settle(catalog: Catalog, run: str) -> None:
    """Write down that what a run that was killed has left is put right: it is over, and is not recorded any more."""
    with catalog.writing() as connection:
        connection.execute(
            "UPDATE runs SET ended = ? WHERE id = ? AND state = 'failed' AND ended IS NULL", (_now(), run)
        )


def failed_points(catalog: Catalog, vm: str, datastore: str) -> set[str]:
    """The points of those backups of a VM (by UUID) to a datastore that failed, were cancelled, or are over since
    `settle`. Runs of versions before 4 of the tables have no point.
    """
    query = """
        SELECT point FROM runs
        WHERE vm_uuid = ? AND datastore = ? AND state IN (?, ?) AND ended IS NOT NULL AND point IS NOT NULL
    """
    chosen = (vm, datastore, RunState.FAILED.value, RunState.CANCELLED.value)
    with catalog.reading() as connection:
        return {row["point"] for row in connection.execute(query, chosen)}


def increment_of(catalog: Catalog, run: str) -> tuple[Image, Increment] | None:
    """What a run recorded, if it did and that is still there."""
    with catalog.reading() as connection:
        row = connection.execute("SELECT image, increment FROM runs WHERE id = ?", (run,)).fetchone()
    if row is None or row["image"] is None:
        return None
    for image in images.where(catalog, number=row["image"]):
        for increment in image.increments:
            if increment.id == row["increment"]:
                return image, increment
    return None


def last(catalog: Catalog, vm: str, limit: int) -> list[PastRun]:
    """The last runs of a VM (by UUID), newest first."""
    query = "SELECT * FROM runs WHERE vm_uuid = ? ORDER BY rowid DESC LIMIT ?"
    with catalog.reading() as connection:
        return [_past(row) for row in connection.execute(query, (vm, limit))]


def _past(row: Row) -> PastRun:
    with rows.reading(f"run {row['id']!r:.40}", HINT):
        return PastRun(
            id=rows.required(row, "id", str),
            kind=row["kind"],
            datastore=rows.required(row, "datastore", str),
            type=row["type"],
            started=rows.date(row["started"], "started"),
            ended=rows.date(row["ended"], "ended") if row["ended"] else None,
            state=row["state"],
            phase=row["phase"],
            image=row["image"],
            increment=row["increment"],
            error_class=row["error_class"],
            error=row["error"],
        )
