"""The journal of flattens: what has begun, and the sources that are still to be deleted."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from sqlite3 import Connection
from typing import TYPE_CHECKING

from backupcore.errors import IntegrityError, UnsupportedOperation
from backupcore.model import Image, SourceRef
from vmkeep.catalog import images, points, rows, tokens
from vmkeep.catalog.database import Catalog

if TYPE_CHECKING:
    from backupcore.flatten import Flattened

__all__ = [
    "Leftover",
    "begin",
    "begun",
    "drop",
    "left_in",
    "leftovers",
    "owners",
    "record",
    "room",
    "undo",
    "unfinished",
]

log = logging.getLogger("vmkeep.catalog")


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """A source that nothing refers to any more, and that is still to be deleted."""

    datastore: str
    source: SourceRef


def begin(catalog: Catalog, image: Image, to: int) -> None:
    """Write down that a flatten begins; the image is not built on meanwhile. UnsupportedOperation if it cannot be."""
    with catalog.writing() as connection:
        row = connection.execute("SELECT pinned, state FROM images WHERE number = ?", (image.number,)).fetchone()
        if row["pinned"]:
            raise UnsupportedOperation(
                f"image {image.number} is pinned", f"Unpin it first: vmkeep image unpin {image.number}"
            )
        state = row["state"]
        if state not in ("open", "closed"):
            raise UnsupportedOperation(f"image {image.number} is {state}", "Verify it, or restore what is left.")
        connection.execute(
            'INSERT INTO flattens (image, "to", state, started) VALUES (?, ?, ?, ?)',
            (image.number, to, state, datetime.now(UTC).isoformat()),
        )
        connection.execute("UPDATE images SET state = 'flattening' WHERE number = ?", (image.number,))


def begun(catalog: Catalog, image: Image) -> str | None:
    """What the state of this image was before its flatten, if one has begun and was neither recorded nor undone."""
    with catalog.reading() as connection:
        return _state_before(connection, image)


def undo(catalog: Catalog, image: Image) -> None:
    """Let the image be what it was before its flatten began."""
    with catalog.writing() as connection:
        state = _state_before(connection, image)
        if state is not None:
            connection.execute("UPDATE images SET state = ? WHERE number = ?", (state, image.number))
            connection.execute("DELETE FROM flattens WHERE image = ?", (image.number,))


def record(catalog: Catalog, image: Image, done: Flattened, *, driver: str = "") -> None:
    """Put the new full in the place of what it was made from, all or nothing; the old sources are leftovers then.

    ContractViolation, which names the `driver`, if its source is that of another backup.
    """
    with catalog.writing() as connection:
        tokens.require_new(connection, image.datastore, driver, done.increment.source)
        state = _state_before(connection, image)
        there = connection.execute(
            "SELECT id, source, frozen_seconds, sequence FROM increments WHERE image = ? AND id <= ? ORDER BY id",
            (image.number, done.increment.id),
        ).fetchall()
        if state is None or [(row["id"], row["source"]) for row in there] != [
            (increment.id, increment.source.token) for increment in done.replaces
        ]:
            raise IntegrityError(f"image {image.number} changed while it was flattened")
        connection.executemany(
            "DELETE FROM increments WHERE image = ? AND id = ?", [(image.number, row["id"]) for row in there]
        )
        images.insert(
            connection,
            image.number,
            done.increment,
            stored=done.stored,
            frozen_seconds=there[-1]["frozen_seconds"],
            seconds=done.seconds,
            sequence=there[-1]["sequence"],
        )
        points.retire(connection, image.vm, [one.point for one in done.replaces if one.point != done.increment.point])
        connection.execute(
            "UPDATE images SET state = ?, began = ? WHERE number = ?",
            (state, done.began.astimezone(UTC).isoformat(), image.number),
        )
        connection.execute("DELETE FROM flattens WHERE image = ?", (image.number,))
        connection.executemany(
            "INSERT INTO leftovers (vm_uuid, datastore, source) VALUES (?, ?, ?)",
            [(image.vm.uuid, image.datastore, one.source.token) for one in reversed(done.replaces)],
        )


def unfinished(catalog: Catalog) -> list[int]:
    """The numbers of the images whose flatten has begun, and was neither recorded nor undone."""
    with catalog.reading() as connection:
        return [row["image"] for row in connection.execute("SELECT image FROM flattens ORDER BY image")]


def owners(catalog: Catalog) -> list[str]:
    """The UUIDs of the VMs that flattens have left something of."""
    with catalog.reading() as connection:
        return [row["vm_uuid"] for row in connection.execute("SELECT DISTINCT vm_uuid FROM leftovers")]


def leftovers(catalog: Catalog, vm: str) -> list[Leftover]:
    """What flattens of this VM (UUID) have left to be deleted, in the order in which it is to go."""
    query = "SELECT datastore, source FROM leftovers WHERE vm_uuid = ? ORDER BY number"
    with catalog.reading() as connection:
        found = []
        for row in connection.execute(query, (vm,)).fetchall():
            try:
                left = Leftover(datastore=rows.required(row, "datastore", str), source=rows.source(row["source"]))
            except ValueError as error:
                log.warning("what a flatten has left is damaged in the catalog, and stays where it is: %s", error)
            else:
                found.append(left)
    return found


def left_in(catalog: Catalog, datastore: str) -> set[SourceRef]:
    """What flattens, of whichever VM, have left in this datastore to be deleted."""
    with catalog.reading() as connection:
        found = connection.execute("SELECT source FROM leftovers WHERE datastore = ?", (datastore,)).fetchall()
    return rows.sources(found)


def drop(catalog: Catalog, gone: list[Leftover]) -> None:
    """These are deleted."""
    with catalog.writing() as connection:
        connection.executemany(
            "DELETE FROM leftovers WHERE datastore = ? AND source = ?",
            [(one.datastore, one.source.token) for one in gone],
        )


def room(catalog: Catalog, image: Image, to: int) -> int | None:
    """How many bytes the increments up to `to` have taken in their datastore; None where that is not known of all."""
    query = "SELECT count(*), count(stored), sum(stored) FROM increments WHERE image = ? AND id <= ?"
    with catalog.reading() as connection:
        count, known, total = connection.execute(query, (image.number, to)).fetchone()
    return int(total) if count == known and total is not None else None


def _state_before(connection: Connection, image: Image) -> str | None:
    row = connection.execute("SELECT state FROM flattens WHERE image = ?", (image.number,)).fetchone()
    return row["state"] if row else None
