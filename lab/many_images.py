"""A catalog with many images of many VMs, for what has to be quick whatever their number."""

from __future__ import annotations

import json

from backupcore.model import new_id
from vmkeep.catalog import schema
from vmkeep.catalog.database import Catalog

__all__ = ["HOST", "fill"]

HOST = "here"
"""The host that all of them are of."""


def fill(catalog: Catalog, *, vms: int, increments: int) -> None:
    """One open image for each of `vms` VMs (``vm1``, ``vm2``, …), of that many increments, in the datastore ``nas``."""
    disks = json.dumps([{"id": "vda", "artifact": "disk.vda.qcow2", "virtual_size": 1 << 30, "whole": False}])
    numbers = range(1, vms + 1)
    with catalog.writing() as connection:
        connection.execute(
            schema.images.insert(),
            [
                {
                    "number": number,
                    "uuid": new_id(),
                    "vm_uuid": f"{number:036}",
                    "vm_name": f"vm{number}",
                    "datastore": "nas",
                    "state": "open",
                    "pinned": False,
                    "host": HOST,
                }
                for number in numbers
            ],
        )
        connection.execute(
            schema.increments.insert(),
            [
                {
                    "image": number,
                    "id": at,
                    "pid": at - 1,
                    "type": "INCREMENT" if at else "FULL",
                    "point": new_id(),
                    "source": new_id(),
                    "size": 1 << 20,
                    "date": "2026-01-01T00:00:00+00:00",
                    "consistency": "crash",
                    "reason": "",
                    "digest": "0" * 64,
                    "disks": disks,
                    "read": 0,
                    "frozen_seconds": 0.0,
                    "seconds": 1.0,
                }
                for number in numbers
                for at in range(increments)
            ],
        )
