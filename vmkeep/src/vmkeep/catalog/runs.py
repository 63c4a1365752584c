"""Every run in the catalog, the failed ones too."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import insert, select, update

from backupcore.model import BackupRun, Image, Increment, RunState
from backupcore.session import Recorded
from vmkeep.catalog import images, schema
from vmkeep.catalog.database import Catalog

__all__ = ["PastRun", "begin", "died", "fail", "increment_of", "last", "record"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PastRun:
    """One run as it was. `state` is running, recorded, failed or cancelled; `error_class` and `error` say why."""

    id: str
    datastore: str
    type: str
    started: datetime
    ended: datetime | None
    state: str
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
            insert(schema.runs).values(
                id=run.id,
                vm_uuid=run.vm.uuid,
                vm_name=run.vm.name,
                datastore=run.datastore,
                type=run.type.value,
                started=_now(),
                state="running",
            )
        )


def record(catalog: Catalog, recorded: Recorded) -> int:
    """Write the increment and the end of its run down, both or neither; returns the image's number."""
    with catalog.writing() as connection:
        number = images.record(connection, recorded)
        connection.execute(
            update(schema.runs)
            .where(schema.runs.c.id == recorded.run.id)
            .values(
                ended=_now(),
                state=RunState.RECORDED.value,
                type=recorded.increment.type.value,
                image=number,
                increment=recorded.increment.id,
            )
        )
    return number


def fail(catalog: Catalog, run: str, state: RunState, *, kind: str, error: str, traceback: str = "") -> None:
    """Write down how a run ended that was not recorded. A recorded one stays recorded."""
    with catalog.writing() as connection:
        connection.execute(
            update(schema.runs)
            .where(schema.runs.c.id == run, schema.runs.c.state == "running")
            .values(ended=_now(), state=state.value, error_class=kind, error=error, traceback=traceback or None)
        )


def died(catalog: Catalog, vm: str) -> list[str]:
    """Of this VM's runs (by UUID), those that still count as running were killed; the caller holds the VM's lock.

    Returns their IDs.
    """
    table = schema.runs.c
    of_these = (table.vm_uuid == vm) & (table.state == "running")
    with catalog.writing() as connection:
        found = list(connection.execute(select(table.id).where(of_these).order_by(table.started)).scalars())
        connection.execute(
            update(schema.runs)
            .where(of_these)
            .values(state=RunState.FAILED.value, error_class="Killed", error="the process was killed")
        )
    return found


def increment_of(catalog: Catalog, run: str) -> tuple[Image, Increment] | None:
    """What a run recorded, if it did and that is still there."""
    table = schema.runs.c
    with catalog.reading() as connection:
        row = connection.execute(select(table.image, table.increment).where(table.id == run)).one_or_none()
    if row is None or row.image is None:
        return None
    for image in images.where(catalog, number=row.image):
        for increment in image.increments:
            if increment.id == row.increment:
                return image, increment
    return None


def last(catalog: Catalog, vm: str, limit: int) -> list[PastRun]:
    """The last runs of a VM (by UUID), newest first."""
    table = schema.runs.c
    query = select(schema.runs).where(table.vm_uuid == vm).order_by(table.started.desc()).limit(limit)
    with catalog.reading() as connection:
        return [
            PastRun(
                id=row.id,
                datastore=row.datastore,
                type=row.type,
                started=datetime.fromisoformat(row.started),
                ended=datetime.fromisoformat(row.ended) if row.ended else None,
                state=row.state,
                image=row.image,
                increment=row.increment,
                error_class=row.error_class,
                error=row.error,
            )
            for row in connection.execute(query)
        ]
