"""Chains that go on, or begin anew with a reason, whatever libvirt has forgotten and whatever lies about."""

from __future__ import annotations

import subprocess

import libvirt
import pytest

from backupcore.model import Type
from backupcore_libvirt import checkpoint
from backupcore_libvirt.connection import Connection

MiB = 1 << 20


def foreign(vm, name: str) -> None:
    """A checkpoint that somebody else made."""
    vm.domain.checkpointCreateXML(f"<domaincheckpoint><name>{name}</name></domaincheckpoint>", 0)


def test_checkpoints_that_libvirt_has_forgotten_are_redefined(lab, chains):
    vm = lab.vm(["qcow2:8", "qcow2:8"])
    vm.write("vda", "write -P 0x11 0 1M")
    chains.backup(vm)
    for number in range(2):
        vm.write("vda", f"write -P {0x20 + number} {number}M 64k")
        vm.redefine()
        assert vm.checkpoints() == set()
        vm.start()
        vm.write("vdb", f"write -P {0x30 + number} {number}M 64k")
        assert chains.backup(vm).run.type is Type.INCREMENT
    names = {f"backupcore-{point}" for point in chains.kept}
    assert vm.bitmaps() == {disk: sorted(names) for disk in ("vda", "vdb")}
    assert vm.checkpoints() == names
    chains.check()


def test_a_transient_vm_is_started_again(lab, chains):
    vm = lab.vm(["qcow2:8"], start=False)
    text = vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    vm.domain.undefine()
    for number in range(3):
        vm.domain = vm.connection.createXML(text)
        vm.write("vda", f"write -P {0x20 + number} {number}M 64k")
        recorded = chains.backup(vm)
        assert recorded.run.type is (Type.INCREMENT if number else Type.FULL)
        assert recorded.increment.consistency == "crash"
        vm.domain.destroy()
    vm.domain = vm.connection.defineXML(text)
    chains.check()


def test_two_chains_side_by_side(lab, chains):
    vm = lab.vm(["qcow2:16", "qcow2:4"])
    foreign(vm, "somebody")
    for number, store in enumerate("abaabbab"):
        vm.write("vda", f"write -P {0x10 + number} {number}M 100k", f"write -z {number}M 64k")
        vm.write("vdb", f"write -P {0x20 + number} {number * 64}k 64k")
        if number in (3, 5):
            vm.start() if not vm.active else vm.destroy()
        recorded = chains.backup(vm, store)
        assert recorded.run.type is (Type.FULL if number < 2 else Type.INCREMENT)
        names = sorted([*(f"backupcore-{point}" for point in chains.kept), "somebody"])
        assert vm.bitmaps() == {"vda": names, "vdb": names}
    assert len(chains.kept) == 4
    assert "somebody" in vm.checkpoints()
    chains.check()


@pytest.mark.parametrize("running", [True, False])
def test_strays_of_ours_go_and_those_of_others_stay(running, lab, chains, runs):
    vm = lab.vm(["qcow2:8", "qcow2:8"])
    foreign(vm, "somebody")
    foreign(vm, "backupcore-of-somebody")
    with runs.take(runs.run(vm)) as whose_record_was_lost:
        pass
    stray = f"backupcore-{whose_record_was_lost.run.point}"
    with runs.take(runs.run(vm)) as forgotten:
        pass
    vm.domain.checkpointLookupByName(f"backupcore-{forgotten.run.point}").delete(
        libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY
    )
    half = "backupcore-" + "0" * 32  # on one disk alone
    vm.monitor("block-dirty-bitmap-add", node=vm.node("vdb"), name=half, persistent=True)
    assert stray in vm.checkpoints()
    if not running:
        vm.destroy()
    recorded = chains.backup(vm)
    names = sorted(["somebody", "backupcore-of-somebody", f"backupcore-{recorded.increment.point}"])
    assert vm.bitmaps() == {"vda": names, "vdb": names}
    assert vm.checkpoints() <= set(names)
    assert {"somebody", "backupcore-of-somebody"} <= vm.checkpoints()


@pytest.mark.parametrize("running", [True, False])
def test_a_reset_is_possible_whatever_lies_about(running, lab, chains):
    vm = lab.vm(["qcow2:8", "qcow2:8"])
    for store in ("a", "b"):
        chains.backup(vm, store)
    foreign(vm, "somebody")
    vm.destroy()
    vm.start()
    for store in ("a", "b"):
        chains.backup(vm, store)
    vm.kill()  # what was closed cleanly once is inconsistent now, what was made since is missing
    vm.qemu_img("bitmap", "--remove", disk="vdb", more=["somebody"])
    if running:
        vm.start()
    recorded = chains.backup(vm, reset=True)
    assert (recorded.run.type, recorded.increment.reason) == (Type.FULL, "reset asked for")
    assert chains.backup(vm).run.type is Type.INCREMENT
    other = chains.backup(vm, "b")
    assert other.run.type is Type.FULL
    assert "disk vda: the bitmap of the last backup is missing" in other.increment.reason
    assert chains.backup(vm, "b").run.type is Type.INCREMENT
    names = {f"backupcore-{point}" for point in chains.kept}
    assert set(vm.bitmaps()["vdb"]) == names
    assert set(vm.bitmaps()["vda"]) == {*names, "somebody"}
    assert "somebody" in vm.checkpoints()
    chains.check()


def snapshot(what: str, vm) -> None:
    command = ["qemu-img", "snapshot", what, "before", str(vm.disk("vda"))]
    subprocess.run(command, check=True, capture_output=True, text=True)


def test_a_shrink_that_a_crash_hinders_works_once_the_bitmaps_are_forgotten(lab, chains, hypervisor):
    vm = lab.vm(["qcow2:8"])
    chains.backup(vm)
    vm.destroy()
    vm.start()
    vm.kill()
    with pytest.raises(AssertionError, match="is inconsistent"):
        vm.resize("vda", "--shrink", "6M")
    hypervisor.forget(vm.identity)
    vm.resize("vda", "--shrink", "6M")
    assert chains.backup(vm).run.type is Type.FULL
    chains.check()


def test_a_revert_that_bitmaps_hinder_works_once_they_are_forgotten(lab, chains, hypervisor):
    vm = lab.vm(["qcow2:8"], start=False)
    vm.write("vda", "write -P 0x11 0 1M")
    chains.backup(vm)
    snapshot("-c", vm)
    vm.write("vda", "write -P 0x12 0 1M")
    with pytest.raises(subprocess.CalledProcessError) as refused:
        snapshot("-a", vm)
    assert "Device has active dirty bitmaps" in refused.value.stderr
    hypervisor.forget(vm.identity)
    snapshot("-a", vm)
    recorded = chains.backup(vm)
    assert recorded.run.type is Type.FULL
    assert "has snapshots (before)" in recorded.increment.reason
    assert vm.bitmaps() == {"vda": []}, "none beside a snapshot"
    snapshot("-a", vm)
    snapshot("-d", vm)
    for kind in (Type.FULL, Type.INCREMENT):
        assert chains.backup(vm).run.type is kind
    chains.check()


@pytest.mark.parametrize("running", [True, False])
def test_all_of_ours_can_be_removed(running, lab, chains, hypervisor):
    vm = lab.vm(["qcow2:8"])
    vm.write("vda", "write -P 0x11 0 1M")
    foreign(vm, "somebody")
    for store in ("a", "b"):
        chains.backup(vm, store)
    if not running:
        vm.destroy()
    names = sorted(f"backupcore-{point}" for point in chains.kept)
    with Connection(hypervisor.uri) as connection:
        found = checkpoint.found(connection.domain(vm.uuid))
    assert [one.name for one in found] == names
    assert hypervisor.forget(vm.identity) == names
    assert hypervisor.forget(vm.identity) == []
    assert vm.bitmaps() == {"vda": ["somebody"]}
    recorded = chains.backup(vm)
    assert recorded.run.type is Type.FULL
