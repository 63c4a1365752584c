"""Many VMs with many increments: the list and retention look at all of them within a second. (Soak: it measures.)"""

from __future__ import annotations

import json
import time

import pytest

from backupcore.chain import retention
from backupcore.model import new_id
from vmkeep.catalog import chains, images, schema
from vmkeep.catalog.database import Catalog

VMS = 2000
INCREMENTS = 50


@pytest.mark.soak
def test_the_list_and_the_retention_plan_of_2000_vms_take_less_than_a_second_each(tmp_path):
    catalog = Catalog.open(tmp_path / "catalog.sqlite")
    disks = json.dumps([{"id": "vda", "artifact": "disk.vda.qcow2", "virtual_size": 1 << 30, "whole": False}])
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
                    "host": "here",
                }
                for number in range(1, VMS + 1)
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
                for number in range(1, VMS + 1)
                for at in range(INCREMENTS)
            ],
        )
    for what in (_list, _plan):
        best = min(what(catalog) for _ in range(5))
        assert best < 1.0, f"{what.__name__}: {best:.2f} s"


def _list(catalog: Catalog) -> float:
    started = time.process_time()
    assert sum(one.count for one in images.listed(catalog)) == VMS * INCREMENTS
    return time.process_time() - started


def _plan(catalog: Catalog) -> float:
    started = time.process_time()
    plans = [
        retention(one.chains, {"MODE": "INCREMENT", "KEEP_LAST": "7", "KEEP_CHAINS": ""})
        for one in chains.chains(catalog, "here")
    ]
    assert len(plans) == VMS
    assert all(one.flattening is not None and one.flattening.to == INCREMENTS - 7 for one in plans)
    return time.process_time() - started
