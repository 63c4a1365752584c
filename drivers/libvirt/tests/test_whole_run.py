"""The session, a real VM, and a driver that keeps everything in memory: backups, restores, and what may go wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from backupcore import Context, Datastore, hookimpl, run_backup
from backupcore.chain import plan
from backupcore.errors import HypervisorError
from backupcore.model import Image, Increment, Type
from backupcore.restore import restore
from backupcore.session import Recorded
from backupcore.testing.memory import MemoryDriver
from lab.vm import same

MiB = 1 << 20


@dataclass
class Site:
    """One VM, one datastore, and a catalog of one image."""

    datastore: Datastore
    folder: Path
    image: Image | None = None
    numbers: Iterator[int] = field(default_factory=lambda: iter(range(99)))

    def context(self) -> Context:
        folder = self.folder / str(next(self.numbers))
        folder.mkdir(mode=0o700)
        return Context(folder)

    def backup(self, vm) -> Recorded:
        run = plan(self.image, vm=vm.identity, host="here", datastore="mem", settings={})
        with self.context() as ctx:
            return run_backup(self.datastore, run, ctx, record=self.record)

    def record(self, recorded: Recorded) -> None:
        before: tuple[Increment, ...] = ()
        if self.image is not None and recorded.run.type is Type.INCREMENT:
            before = self.image.increments
        self.image = Image(
            uuid=recorded.run.image,
            number=0,
            vm=recorded.run.vm,
            datastore="mem",
            state="open",
            increments=(*before, recorded.increment),
        )

    def restored(self, number: int) -> dict[str, Path]:
        target = self.folder / f"restored{next(self.numbers)}"
        target.mkdir()
        with self.context() as ctx:
            done = restore(self.datastore, self.image, number, ctx, target=lambda disk: target / f"{disk.id}.qcow2")
        return {disk.id: disk.path for disk in done.disks}


@pytest.fixture
def site(hypervisor, tmp_path) -> Site:
    return Site(Datastore("mem", MemoryDriver(), hypervisor=hypervisor), tmp_path)


def test_backups_of_a_real_vm_are_restored_to_every_point(small, site, tmp_path, hypervisor):
    truths = []
    for number in range(3):
        small.io("vda", f"write -P {number + 1} {number}M 1500k", "write -z 3M 64k", f"discard {number}M 64k")
        small.io("vdb", f"write -P {number + 7} {number * 100}k 1k")
        truths.append(small.copy_truth(tmp_path / f"truth{number}"))
        recorded = site.backup(small)
        assert not recorded.warnings
        assert recorded.run.type is (Type.INCREMENT if number else Type.FULL)
        if number:
            assert recorded.read <= 1500 * 1024 + MiB, "what has changed, and no more"
    for number, truth in enumerate(truths):
        for disk, path in site.restored(number).items():
            assert same(truth[disk], path)
    assert len(small.checkpoints()) == 2, "the last two stay"
    assert list(hypervisor.scratch.iterdir()) == []


def test_an_increment_that_is_impossible_becomes_a_full_with_the_reason(small, site):
    site.backup(small)
    (old,) = small.checkpoints()
    for disk in ("vda", "vdb"):
        small.monitor("block-dirty-bitmap-remove", node=small.node(disk), name=old)
    recorded = site.backup(small)
    assert recorded.run.type is Type.FULL
    assert "disk vdb: the bitmap of the last backup is missing" in recorded.increment.reason
    assert small.checkpoints() == {f"backupcore-{recorded.increment.point}"}
    assert site.backup(small).run.type is Type.INCREMENT


class BrokenDriver(MemoryDriver):
    """Fails after the first artifact."""

    @hookimpl
    def backup(self, artifacts, run, ctx):
        artifacts[0].open().read(MiB)
        raise HypervisorError("broken")


def test_a_driver_that_fails_leaves_the_guest_as_it_was(small, hypervisor, tmp_path):
    small.io("vda", "write -P 1 0 4M")
    site = Site(Datastore("mem", BrokenDriver(), hypervisor=hypervisor), tmp_path)
    with pytest.raises(HypervisorError, match="broken"):
        site.backup(small)
    small.untouched()
    assert list(hypervisor.scratch.iterdir()) == []
