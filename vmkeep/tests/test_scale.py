"""Many VMs with many increments: the list and retention look at all of them within a second. (Soak: it measures.)"""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from backupcore.chain import retention
from lab import many_images
from vmkeep.catalog import chains, images
from vmkeep.catalog.database import Catalog

VMS = 2000
INCREMENTS = 50


@pytest.mark.soak
def test_the_list_and_the_retention_plan_of_2000_vms_take_less_than_a_second_each(tmp_path):
    catalog = Catalog.open(tmp_path / "catalog.sqlite")
    many_images.fill(catalog, vms=VMS, increments=INCREMENTS)
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
        for one in chains.chains(catalog, many_images.OWN, now=datetime.now(UTC))
    ]
    assert len(plans) == VMS
    assert all(one.flattening is not None and one.flattening.to == INCREMENTS - 7 for one in plans)
    return time.process_time() - started
