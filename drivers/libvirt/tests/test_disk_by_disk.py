"""Increments in which some disks are taken whole: added, raw, shrunk, exchanged, or without their bitmap."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess

import libvirt
import pytest

from backupcore.model import Type

MiB = 1 << 20


def made(lab, name: str, shape: str, size: str):
    """An image that QEMU's user may open."""
    path = lab.folder / f"{name}.{shape}"
    subprocess.run(["qemu-img", "create", "-q", "-f", shape, path, size], check=True)
    if os.geteuid() == 0:
        found = lab.folder.stat()
        shutil.chown(path, found.st_uid, found.st_gid)
    return path


def disk_xml(path, target: str, bus: str = "scsi") -> str:
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='{path.suffix[1:]}' discard='unmap'/>"
        f"<source file='{path}'/><target dev='{target}' bus='{bus}'/><alias name='ua-{target}'/></disk>"
    )


def whole(recorded) -> dict[str, str]:
    """The disks that are whole, and why."""
    return {disk.id: disk.reason for disk in recorded.increment.disks if disk.whole}


RAW = "raw: changed blocks are tracked in qcow2 only"


def test_disks_that_come_and_go_and_grow(lab, chains):
    vm = lab.vm(["qcow2:16"])
    vm.write("vda", "write -P 0x11 0 4M")
    chains.backup(vm)
    for name, shape in (("sdb", "qcow2"), ("sdc", "raw")):
        vm.domain.attachDeviceFlags(
            disk_xml(made(lab, name, shape, "8M"), name),
            libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG,
        )
        vm.write(name, "write -P 0x21 1M 1M")
    vm.write("vda", "write -P 0x12 2M 64k")
    recorded = chains.backup(vm)
    assert recorded.run.type is Type.INCREMENT
    assert whole(recorded) == {"sdb": "added since the last backup", "sdc": "added since the last backup"}
    vm.write("sdb", "write -P 0x22 3M 64k", "write -z 1M 64k")
    vm.write("sdc", "write -P 0x23 3M 64k")
    recorded = chains.backup(vm)
    assert whole(recorded) == {"sdc": RAW}
    assert recorded.read < 3 * MiB, "of the disk that was added, only what changed"
    vm.domain.blockResize("sdb", 12 * MiB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    vm.write("sdb", "write -P 0x24 11M 64k")
    assert whole(chains.backup(vm)) == {"sdc": RAW}
    vm.destroy()
    vm.resize("vda", "24M")
    vm.write("vda", "write -P 0x13 23M 64k")
    assert whole(chains.backup(vm)) == {"sdc": RAW}
    removed = disk_xml(vm.disk("sdb"), "sdb")
    vm.domain.detachDeviceFlags(removed, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    vm.write("vda", "write -P 0x14 5M 64k")
    recorded = chains.backup(vm)
    assert [disk.id for disk in recorded.increment.disks] == ["vda", "sdc"]
    vm.domain.attachDeviceFlags(removed, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    vm.start()
    assert whole(chains.backup(vm)) == {"sdb": "added since the last backup", "sdc": RAW}
    vm.write("sdb", "write -P 0x25 0 64k")
    assert whole(chains.backup(vm)) == {"sdc": RAW}
    assert len(chains.images) == 1
    chains.check()


def test_a_disk_that_was_shrunk_is_taken_whole_and_then_goes_on(lab, chains):
    vm = lab.vm(["qcow2:16", "qcow2:16"], start=False)
    for disk in ("vda", "vdb"):
        vm.write(disk, "write -P 0x11 0 16M")
    chains.backup(vm)
    vm.resize("vda", "--shrink", "8M")
    recorded = chains.backup(vm)
    assert whole(recorded) == {"vda": f"it has shrunk from {16 * MiB} to {8 * MiB} bytes"}
    vm.start()
    vm.write("vda", "write -P 0x12 0 64k")
    assert whole(chains.backup(vm)) == {}
    chains.check()


@pytest.mark.parametrize(
    ("running", "end"),
    [
        (True, "rewritten"),
        pytest.param(False, "rewritten", marks=pytest.mark.soak),
        (False, "left alone"),
        (True, "grown further"),
    ],
)
def test_a_disk_that_was_shrunk_and_grown_again_is_taken_whole(running, end, lab, chains):
    vm = lab.vm(["qcow2:16", "qcow2:16"], start=running)
    for disk in ("vda", "vdb"):
        vm.write(disk, "write -P 0x11 0 16M")
    chains.backup(vm)
    vm.write("vda", "write -P 0x12 1M 64k")
    assert whole(chains.backup(vm)) == {}
    size = 20 if end == "grown further" else 16
    if running:
        for mebibytes in (8, size):
            vm.domain.blockResize("vda", mebibytes * MiB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    else:
        vm.resize("vda", "--shrink", "8M")
        vm.resize("vda", f"{size}M")
    if end == "rewritten":  # as a partition table's copy at the end of a disk is
        vm.write("vda", "write -P 0x13 16320k 64k")
    vm.write("vdb", "write -P 0x14 16320k 64k")
    assert whole(chains.backup(vm)) == {"vda": "it was shrunk and grown again since the last backup"}
    assert whole(chains.backup(vm)) == {}
    chains.check()


def test_a_disk_whose_end_is_discarded_or_rewritten_is_not_taken_for_one_that_was_cut(lab, chains):
    vm = lab.vm(["qcow2:16"])
    vm.write("vda", "write -P 0x11 0 16M")
    chains.backup(vm)
    for command in ("discard 8M 8M", "write -P 0x12 12M 1M", "discard 0 16M"):
        vm.write("vda", command)
        assert whole(chains.backup(vm)) == {}
    vm.write("vda", "write -P 0x13 3M 64k")
    assert whole(chains.backup(vm)) == {}
    chains.check()


@pytest.mark.parametrize("running", [True, False])
def test_one_disk_has_lost_its_bitmap(running, lab, chains):
    vm = lab.vm(["qcow2:8", "qcow2:8"])
    for disk in ("vda", "vdb"):
        vm.write(disk, "write -P 0x11 0 1M")
    chains.backup(vm)
    chains.backup(vm)
    (name,) = (f"backupcore-{point}" for point in chains.kept[-1:])
    if running:
        vm.monitor("block-dirty-bitmap-disable", node=vm.node("vdb"), name=name)
    else:
        vm.destroy()
        vm.qemu_img("bitmap", "--remove", disk="vdb", more=[name])
    vm.write("vda", "write -P 0x12 2M 64k")
    vm.write("vdb", "write -P 0x13 3M 64k")
    recorded = chains.backup(vm)
    why = "not recording" if running else "missing: QEMU has crashed, it was removed, or this is another image"
    assert whole(recorded) == {"vdb": f"the bitmap of the last backup is {why}"}
    vm.write("vdb", "write -P 0x14 4M 64k")
    assert whole(chains.backup(vm)) == {}
    points = sorted(f"backupcore-{point}" for point in chains.kept)
    assert vm.bitmaps() == {"vda": points, "vdb": points}
    chains.check()


@pytest.mark.parametrize("forgotten", [True, False])
def test_disks_that_were_exchanged_are_not_taken_for_each_other(forgotten, lab, chains):
    vm = lab.vm(["qcow2:8", "qcow2:8", "qcow2:8"])
    vm.write("vda", "write -P 0x11 0 1M")
    vm.write("vdb", "write -P 0x12 0 1M")
    chains.backup(vm)
    vm.destroy()
    if forgotten:
        vm.redefine()
    first, second = vm.disk("vda"), vm.disk("vdb")
    vm.change((str(first), "/between"), (str(second), str(first)), ("/between", str(second)))
    recorded = chains.backup(vm)
    assert whole(recorded) == {
        "vda": f"it is now {second}, at the last backup it was {first}",
        "vdb": f"it is now {first}, at the last backup it was {second}",
    }
    vm.start()
    vm.write("vda", "write -P 0x13 3M 64k")
    assert whole(chains.backup(vm)) == {}
    chains.check()


@pytest.mark.parametrize("taken", ["before the last backup", "after the last backup"])
def test_a_file_level_copy_of_a_disk_that_was_put_back(taken, lab, chains):
    vm = lab.vm(["qcow2:8", "qcow2:8"], start=False)
    copy = vm.disk("vda").with_name("copy.qcow2")
    vm.write("vda", "write -P 0x11 0 8M")
    chains.backup(vm)
    vm.write("vda", "write -P 0x12 1M 64k")
    if taken.startswith("before"):
        shutil.copy(vm.disk("vda"), copy)
    chains.backup(vm)
    vm.write("vda", "write -P 0x13 2M 64k")
    if taken.startswith("after"):
        shutil.copy(vm.disk("vda"), copy)
    vm.write("vda", "write -P 0x14 3M 64k")
    shutil.copy(copy, vm.disk("vda"))
    vm.write("vda", "write -P 0x15 4M 64k")
    assert set(whole(chains.backup(vm))) == ({"vda"} if taken.startswith("before") else set())
    chains.check()


def test_somebody_else_moves_the_vm_onto_an_overlay_and_back(lab, chains, wait_for):
    vm = lab.vm(["qcow2:8", "qcow2:8"])
    vm.write("vda", "write -P 0x11 0 1M")
    chains.backup(vm)
    base = vm.disk("vda")
    overlay = base.with_name("overlay.qcow2")
    vm.domain.snapshotCreateXML(
        f"<domainsnapshot><disks><disk name='vda' snapshot='external'><source file='{overlay}'/></disk>"
        "<disk name='vdb' snapshot='no'/></disks></domainsnapshot>",
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA,
    )
    vm.write("vda", "write -P 0x12 1M 64k")
    assert whole(chains.backup(vm)) == {"vda": f"it is now {overlay}, at the last backup it was {base}"}
    vm.write("vda", "write -P 0x13 2M 64k", "discard 0 64k")
    assert whole(chains.backup(vm)) == {}
    vm.domain.blockCommit("vda", None, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)

    def pivots() -> bool:
        with contextlib.suppress(libvirt.libvirtError):  # not ready yet
            vm.domain.blockJobAbort("vda", libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
        return vm.disk("vda") == base

    wait_for(pivots, "the commit has caught up", 60)
    vm.write("vda", "write -P 0x14 3M 64k")
    assert whole(chains.backup(vm)) == {"vda": f"it is now {base}, at the last backup it was {overlay}"}
    vm.write("vda", "write -P 0x15 4M 64k")
    assert whole(chains.backup(vm)) == {}
    assert len(chains.images) == 1
    points = sorted(f"backupcore-{point}" for point in chains.kept)
    assert vm.bitmaps() == {"vda": points, "vdb": points}
    chains.check()
