"""A token is given once: what another run was recorded under, or still is to be deleted, is no new backup's.

Two images of one fork may share a source, since both were recorded, or found, with it. Two runs never do: whichever was
first has been replaced by then, or the second was not stored.
"""

from __future__ import annotations

from sqlite3 import Connection

from backupcore.errors import ContractViolation
from backupcore.model import SourceRef
from backupcore.typed import typed
from vmkeep.catalog.database import Catalog

__all__ = ["check_new", "require_new"]


def check_new(catalog: Catalog, datastore: str, driver: str, source: SourceRef) -> None:
    """ContractViolation, naming driver and token, if `source` is known in this datastore: nothing may be done by it."""
    with catalog.reading() as connection:
        require_new(connection, datastore, driver, source)


def require_new(connection: Connection, datastore: str, driver: str, source: SourceRef) -> None:
    """`check_new` within a caller's transaction: between the two another run may have been recorded under it."""
    row = connection.execute(
        "SELECT number, vm_name, id FROM increments JOIN images ON images.number = increments.image"
        " WHERE datastore = ? AND source = ? ORDER BY number, id",
        (datastore, source.token),
    ).fetchone()
    what = f"driver {driver} of datastore {datastore} gave token {source} a second time"
    if row is not None:
        raise ContractViolation(
            f"{what}: increment {row['id']} of image {row['number']} (VM {row['vm_name']}) was recorded under it",
            "Nothing is recorded, and nothing is deleted. The driver may have replaced that backup: "
            f"{typed('vmkeep image verify', str(row['number']))}",
        )
    if connection.execute(
        "SELECT 1 FROM leftovers WHERE datastore = ? AND source = ?", (datastore, source.token)
    ).fetchone():
        raise ContractViolation(
            f"{what}: a backup that a flatten has merged is still to be deleted under it", "Nothing is recorded."
        )
