"""Listing what a datastore holds: 1,000 sources, each kept by its driver, none known to the catalog."""

from __future__ import annotations

import logging
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from backupcore.context import Context
from backupcore.datastore import Datastore
from backupcore.manifest import NAME
from backupcore.model import VM, BackupRun, BytesArtifact, Type, new_id
from backupcore.testing.life import NoVM, keep
from benchmarks.figures import MIB, Figure
from benchmarks.measure import Sample, costs
from benchmarks.place import Place
from benchmarks.stores import KINDS, Store
from benchmarks.vmkeep import Vmkeep, told_by

__all__ = ["rows"]

_AT_MOST = {"restic": 60.0, "boto3": 10.0, "rsync": 10.0}
_SIDE_BY_SIDE = 2


def rows(place: Place, rounds: int) -> Iterator[Figure]:
    """The figures; 1,000 sources where there are 2 GiB of data, fewer for less."""
    count = 1000 * place.data // (2048 * MIB)
    for kind in KINDS:
        with closing(kind(place)) as store:
            _keep(place, store, count)
            vmkeep = Vmkeep(place, store, store.tool)
            samples = [_listed(vmkeep, count) for _ in range(rounds)]
            yield from costs(f"listing {count} sources, {store.tool}", "vmkeep", samples, _AT_MOST[store.tool])


def _listed(vmkeep: Vmkeep, count: int) -> Sample:
    sample = vmkeep.ask("catalog", "check", "store")
    found = len(told_by(sample)["unused"])
    if found != count:
        raise RuntimeError(f"{found} sources of {count} were listed")
    return sample


def _keep(place: Place, store: Store, count: int) -> None:
    """Keep that many small backups, as a session would; one alone first, which makes what is missing."""
    kept = Datastore.open("store", tomllib.loads(store.table), hypervisor=NoVM())

    def one(number: int) -> None:
        run = BackupRun(
            id=new_id(),
            vm=VM(uuid=f"{number % 20:08}-0000-0000-0000-000000000000", name=f"vm{number % 20}"),
            host="bench",
            datastore="store",
            image=new_id(),
            number=0,
            point=new_id(),
            type=Type.FULL,
            settings={},  # the default, a read-only view, cannot be pickled
        )
        artifacts = [BytesArtifact("disk.vda.qcow2", bytes(4096)), BytesArtifact(NAME, b"{}")]
        with Context(
            Path(tempfile.mkdtemp(prefix="run-", dir=place.folder)), log=logging.getLogger("benchmarks")
        ) as ctx:
            keep(kept, artifacts, run, ctx)

    one(0)
    with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
        list(pool.map(one, range(1, count)))
