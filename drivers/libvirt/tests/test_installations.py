"""Several installations back up one VM: each by checkpoints of its own, and what one has left is its own alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from backupcore.errors import Busy
from backupcore.model import Type
from backupcore_libvirt.plugin import Libvirt

A, B = "a" * 32, "b" * 32
MiB = 1 << 20


@pytest.fixture
def both(chains, hypervisor, tmp_path: Path) -> Iterator[tuple]:
    """The chains of two installations, each with a scratch folder of its own."""
    folder = tmp_path / "others"
    folder.mkdir()
    scratch = hypervisor.scratch.with_name("scratch-b")
    other = type(chains)(Libvirt(hypervisor.uri, scratch), folder, installation=B)
    chains.installation = A
    for one in (hypervisor.scratch, scratch):
        one.mkdir(mode=0o711, exist_ok=True)
    return chains, other


def names(*chains) -> list[str]:
    return sorted(f"backupcore-{one.installation}-{point}" for one in chains for point in one.kept)


@pytest.mark.parametrize("running", [True, False])
def test_each_has_its_chain_and_removes_nothing_of_the_others(running, lab, both):
    vm = lab.vm(["qcow2:8", "qcow2:4"], start=running)
    numbers = itertools.count(1)
    for night, chains in enumerate([*both * 3, both[1], both[1]]):
        if running:
            vm.write("vda", f"write -P {next(numbers)} {night}M 100k")
        else:
            vm.start()
            vm.write("vda", f"write -P {next(numbers)} {night % 8}M 100k")
            vm.destroy()
        recorded = chains.backup(vm)
        assert recorded.run.type is (Type.INCREMENT if night > 1 else Type.FULL)
        assert recorded.increment.reason == ("" if night > 1 else recorded.run.reason)
        assert vm.bitmaps() == {disk: names(*both) for disk in ("vda", "vdb")}
    if running:
        assert vm.checkpoints() == set(names(*both))
    for chains in both:
        chains.check()


def test_a_job_of_the_other_is_looked_for_before_any_checkpoint_is_touched(lab, both, runs):
    first, second = both
    vm = lab.vm(["qcow2:8"])
    for chains in both:
        chains.backup(vm)
    vm.write("vda", "write -P 0x22 0 1M")
    held = first.plan(vm)
    before = vm.checkpoints()
    with runs.take(held):
        begun = vm.checkpoints() - before
        assert begun == {f"backupcore-{A}-{held.point}"}
        for installation in (B, ""):  # an older version takes whatever is not in its list for a stray
            second.installation = installation
            with pytest.raises(Busy):
                second.backup(vm)
            assert vm.checkpoints() == before | begun
        second.installation = B
        with pytest.raises(Busy):
            second.hypervisor.forget(vm.identity, B, foreign=True)
        assert vm.checkpoints() == before | begun
    # The run is not in the chain's list, so the next one clears its checkpoint away and goes on from the one before.
    for chains in both:
        assert chains.backup(vm).run.type is Type.INCREMENT
    assert vm.checkpoints() == set(names(*both))
    for chains in both:
        chains.check()


@pytest.mark.parametrize("running", [True, False])
def test_a_checkpoint_of_an_older_version_is_gone_on_from(running, lab, both):
    first, second = both
    vm = lab.vm(["qcow2:8"])
    vm.write("vda", "write -P 0x11 0 1M")
    first.installation = ""
    old = first.backup(vm)
    assert vm.bitmaps() == {"vda": [f"backupcore-{old.run.point}"]}
    vm.write("vda", "write -P 0x22 1M 1M")
    if not running:
        vm.destroy()
    first.installation = A
    new = first.backup(vm)
    assert new.run.type is Type.INCREMENT
    assert vm.bitmaps() == {"vda": sorted([f"backupcore-{old.run.point}", f"backupcore-{A}-{new.run.point}"])}
    # One that says no installation is anybody's, as it was when there were none.
    second.backup(vm)
    assert vm.bitmaps() == {"vda": sorted(name for name in names(*both) if old.run.point not in name)}
    assert first.backup(vm).run.type is Type.INCREMENT
    first.check()


@pytest.mark.parametrize("running", [True, False])
def test_what_an_installation_has_left_that_is_gone_can_be_removed(running, lab, both):
    first, second = both
    vm = lab.vm(["qcow2:8"])
    for chains in (first, first, second):
        chains.backup(vm)
    if not running:
        vm.destroy()
    found = second.hypervisor.checkpoints(vm.identity)
    assert sorted(one.name for one in found) == names(*both)
    assert {(one.installation, one.point) for one in found} == {
        *((A, point) for point in first.kept),
        *((B, point) for point in second.kept),
    }
    assert second.hypervisor.forget(vm.identity, B, foreign=True) == names(first)
    assert vm.bitmaps() == {"vda": names(second)}
    assert second.backup(vm).run.type is Type.INCREMENT
    again = first.backup(vm)
    assert (again.run.type, "bitmap" in again.increment.reason) == (Type.FULL, True)
    assert sorted(first.hypervisor.forget(vm.identity, A)) == names(first)
    assert vm.bitmaps() == {"vda": names(second)}


def test_overlays_are_not_put_over_the_bitmaps_of_another(lab, both, runs):
    _, second = both
    vm = lab.vm(["qcow2:8"])
    second.backup(vm)
    run = runs.run(vm, installation=A, settings={"INCREMENT_MODE": "SNAPSHOT"})
    with runs.take(run):
        pass
    assert vm.bitmaps() == {"vda": names(second)}
    assert not list(vm.folder.glob("*.backupcore-*"))
    assert second.backup(vm).run.type is Type.INCREMENT
    second.hypervisor.forget(vm.identity, A, foreign=True)
    with runs.take(runs.run(vm, installation=A, settings={"INCREMENT_MODE": "SNAPSHOT"})):
        assert list(vm.folder.glob("*.backupcore-*"))


def test_a_vm_that_is_off_and_is_read_by_the_other_is_busy(lab, both, runs):
    first, second = both
    vm = lab.vm(["qcow2:8"])
    for chains in both:
        chains.backup(vm)
    vm.destroy()
    held = first.plan(vm)
    with runs.take(held):
        begun = vm.bitmaps()
        assert f"backupcore-{A}-{held.point}" in begun["vda"]
        with pytest.raises(Busy, match="open in another process"):
            second.backup(vm)
        assert vm.bitmaps() == begun
    for chains in both:
        assert chains.backup(vm).run.type is Type.INCREMENT
        chains.check()


SNAPSHOT = {"MODE": "INCREMENT", "INCREMENT_MODE": "SNAPSHOT"}


def overlays(vm, installation: str) -> list[Path]:
    return sorted(vm.folder.glob(f"*.backupcore-*.{installation[:8]}*.qcow2"))


@pytest.mark.parametrize("running", [True, False])
def test_overlays_of_another_are_not_merged(running, lab, both, runs, same, tmp_path):
    vm = lab.vm(["qcow2:8"], start=running)
    with runs.take(runs.run(vm, installation=A, settings=SNAPSHOT)) as parent:
        first = runs.keep(parent, tmp_path / "first")
    (held,) = overlays(vm, A)
    vm.write("vda", "write -P 0x33 1M 1M")
    # By bitmaps or by overlays of its own, the other one reads through that overlay and leaves it where it is.
    truth = vm.copy(tmp_path / "truth-b")
    for settings in ({}, SNAPSHOT):
        with runs.take(runs.run(vm, installation=B, settings=settings)) as taken:
            layer = runs.keep(taken, tmp_path / f"b{len(settings)}")
        same([layer], truth)
        assert overlays(vm, A) == [held]
        assert overlays(vm, B) == []
    runs.hypervisor.forget(vm.identity, B)
    assert overlays(vm, A) == [held]
    truth = vm.copy(tmp_path / "truth-a")
    with runs.take(runs.run(vm, parent, installation=A, settings=SNAPSHOT)) as taken:
        second = runs.keep(taken, tmp_path / "second")
    assert not taken.prepared.disks[0].whole
    same([first, second], truth)
    # Once that one is gone.
    (held,) = overlays(vm, A)
    assert str(held) in runs.hypervisor.forget(vm.identity, B, foreign=True)
    assert vm.disk("vda").name == "vda.qcow2"


def test_overlays_of_an_older_version_are_anybodys(lab, both, runs):
    vm = lab.vm(["raw:8"], start=False)
    with runs.take(runs.run(vm, settings=SNAPSHOT)) as parent:
        pass
    (old,) = vm.folder.glob("*.backupcore-*")
    assert old.name == f"vda.raw.backupcore-{parent.run.point}-vda.qcow2"
    with runs.take(runs.run(vm, parent, installation=A, settings=SNAPSHOT)) as taken:
        assert not taken.prepared.disks[0].whole
    assert [path.exists() for path in (old, *overlays(vm, A))] == [False, True]
