"""The points of a VM's backups: those that a next increment may build on, and those whose checkpoints may go."""

from __future__ import annotations

from collections.abc import Sequence
from sqlite3 import Connection, Row

from backupcore.model import VM
from vmkeep.catalog.database import Catalog
from vmkeep.installation import Installation

__all__ = ["kept", "retire", "retired", "spent"]


def retire(connection: Connection, vm: VM, points: Sequence[str]) -> None:
    """Note points that leave the catalog: their checkpoints go with the VM's next recorded run."""
    rows = [(point, vm.uuid) for point in points]
    connection.executemany("INSERT OR IGNORE INTO retired (point, vm_uuid) VALUES (?, ?)", rows)


def retired(catalog: Catalog, vm: VM) -> Sequence[str]:
    """Points of this VM whose images were deleted, and whose checkpoints it may still have."""
    with catalog.reading() as connection:
        return [row["point"] for row in connection.execute("SELECT point FROM retired WHERE vm_uuid = ?", (vm.uuid,))]


def kept(catalog: Catalog, vm: VM) -> tuple[str, ...]:
    """The points of this VM that a next increment may build on: the last two of every chain that is not closed.

    The last but one as well: a run may have to be taken again.
    """
    chains: dict[int, list[str]] = {}
    for row in _points(catalog, vm):
        if row["state"] not in ("closed", "absent"):
            chains.setdefault(row["number"], []).append(row["point"])
    return tuple(point for points in chains.values() for point in points[-2:])


def spent(catalog: Catalog, vm: VM, own: Installation) -> tuple[str, ...]:
    """The points of this VM, of all that the catalog knows of `own`, that no next increment will build on.

    Another installation's points may be in the catalog, found by a rebuild: what it builds on is its own business.
    """
    known = {row["point"] for row in _points(catalog, vm) if own.wrote(row["installation"], row["host"])}
    return tuple(sorted(known.union(retired(catalog, vm)).difference(kept(catalog, vm))))


def _points(catalog: Catalog, vm: VM) -> list[Row]:
    """The point of every increment of this VM, with its image's number and state and whose it is, in their order."""
    query = """
        SELECT number, state, installation, host, point FROM images JOIN increments ON image = number
        WHERE vm_uuid = ? AND typeof(point) = 'text' ORDER BY number, id
    """
    with catalog.reading() as connection:
        return connection.execute(query, (vm.uuid,)).fetchall()
