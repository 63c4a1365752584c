"""A catalog with many images of many VMs, for what has to be quick whatever their number."""

from __future__ import annotations

from datetime import UTC, datetime

from backupcore.model import Disk, Increment, SourceRef, Type, new_id
from vmkeep.catalog import images
from vmkeep.catalog.database import Catalog
from vmkeep.installation import Installation

__all__ = ["OWN", "fill"]

OWN = Installation(id="c" * 32, host="here")
"""Who has taken all of them."""


def fill(catalog: Catalog, *, vms: int, increments: int) -> None:
    """One open image for each of `vms` VMs (``vm1``, ``vm2``, …), of that many increments, in the datastore ``nas``."""
    disk = Disk(id="vda", artifact="disk.vda.qcow2", virtual_size=1 << 30, whole=False)
    with catalog.writing() as connection:
        for number in range(1, vms + 1):
            connection.execute(
                "INSERT INTO images (number, uuid, vm_uuid, vm_name, datastore, state, pinned, host, installation,"
                " sequence) VALUES (?, ?, ?, ?, 'nas', 'open', 0, ?, ?, ?)",
                (number, new_id(), f"{number:036}", f"vm{number}", OWN.host, OWN.id, number),
            )
            for at in range(increments):
                increment = Increment(
                    id=at,
                    pid=at - 1,
                    type=Type.INCREMENT if at else Type.FULL,
                    point=new_id(),
                    source=SourceRef(new_id()),
                    size=1 << 20,
                    date=datetime(2026, 1, 1, tzinfo=UTC),
                    consistency="crash",
                    reason="",
                    digest="0" * 64,
                    disks=(disk,),
                )
                sequence = (number - 1) * increments + at + 1
                images.insert(connection, number, increment, seconds=1.0, sequence=sequence)
