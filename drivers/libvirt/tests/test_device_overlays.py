"""VMs that are held by overlays for the time of a run, and whose disks are block devices or volumes of a storage pool.

Beside a device there is no room: its overlay lies in scratch. The bytes are compared with what QEMU's own tools copied.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import libvirt
import pytest

from backupcore.errors import Busy, HypervisorError, TargetFull, UnsupportedOperation
from backupcore_libvirt.apparmor import denies_merges
from backupcore_libvirt.connection import Connection
from backupcore_libvirt.image_lock import keep_closed
from backupcore_libvirt.overlay.merge import Merger
from backupcore_libvirt.overlay.room import Growing, require_room
from backupcore_libvirt.overlay.stack import stacks
from lab.loop import loop_device

pytestmark = pytest.mark.usefixtures("every_qemu_dies")

MiB = 1 << 20


@pytest.fixture
def loops(needs_root, lab) -> Iterator[dict[str, Path]]:
    """Block devices for a raw disk and for a qcow2 one, of 8 MiB, by the disk's ID."""
    with contextlib.ExitStack() as stack:
        yield {
            disk: stack.enter_context(loop_device(lab.folder / f"loop-{disk}", bytes(size * MiB)))
            for disk, size in (("vdb", 8), ("vdc", 12))
        }


def confined() -> bool:
    """Whether AppArmor confines VMs: libvirt (9.0) then starts none on a volume, which its profiles do not know."""
    connection = libvirt.open("qemu:///system" if os.geteuid() == 0 else "qemu:///session")
    try:
        return "<model>apparmor</model>" in connection.getCapabilities()
    finally:
        connection.close()


@pytest.fixture
def pool(lab) -> Iterator[str]:
    """A storage pool in the lab's folder."""
    if confined():
        pytest.skip("AppArmor lets no VM use a volume")
    connection = libvirt.open("qemu:///system" if os.geteuid() == 0 else "qemu:///session")
    folder = lab.folder / "pool"
    folder.mkdir(mode=0o755)
    xml = f"<pool type='dir'><name>{lab.prefix}pool</name><target><path>{folder}</path></target></pool>"
    made = connection.storagePoolCreateXML(xml, 0)
    yield made.name()
    with contextlib.suppress(libvirt.libvirtError):  # a test may have done so
        made.destroy()
    connection.close()


def put_into_pool(vm, disk: str, pool: str) -> None:
    """Make a disk's file a volume, and the disk one of kind volume. The VM is off."""
    volumes = vm.connection.storagePoolLookupByName(pool)
    file = vm.disk(disk)
    file.rename(Path(ElementTree.fromstring(volumes.XMLDesc()).findtext("target/path"), "web1.qcow2"))
    volumes.refresh()
    root = ElementTree.fromstring(vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
    (found,) = [one for one in root.iterfind("devices/disk") if one.find("source").get("file") == str(file)]
    found.set("type", "volume")
    found.find("source").attrib = {"pool": pool, "volume": "web1.qcow2"}
    vm.connection.defineXML(ElementTree.tostring(root, encoding="unicode"))


@pytest.fixture
def vm(lab, loops, request):
    """vda is a file, vdb a raw device, vdc qcow2 on a device, vdd a volume where a VM may use one, else a file."""
    made = lab.vm(["qcow2:16", "raw:8", "qcow2:8", "qcow2:8"], iothread="disk", devices=loops, start=False)
    if not confined():
        put_into_pool(made, "vdd", request.getfixturevalue("pool"))
    made.start()
    yield made
    made.destroy()  # before its devices go


def sources(vm) -> dict[str, list[tuple[str, dict[str, str], str, list[str]]]]:
    """What both definitions say of each disk: its kind, source, format, and what lies below."""
    found = {}
    for name, flags in (("live", 0), ("stored", libvirt.VIR_DOMAIN_XML_INACTIVE)):
        disks = ElementTree.fromstring(vm.domain.XMLDesc(flags)).iterfind("devices/disk")
        found[name] = [
            (
                disk.get("type"),
                {key: value for key, value in disk.find("source").attrib.items() if key != "index"},
                disk.find("driver").get("type"),
                [source.attrib for source in disk.iterfind("backingStore//source")],
            )
            for disk in disks
        ]
    return found


def overlays(runs, vm) -> list[str]:
    """All that lies in scratch and beside the disks for overlays."""
    scratch = runs.hypervisor.scratch.rglob("*.temporary.qcow2")
    return sorted(path.name for path in [*scratch, *vm.folder.glob("*.backupcore-*")])


def plain(runs, vm, before) -> None:
    """At rest, and defined as before."""
    assert overlays(runs, vm) == []
    assert list(runs.hypervisor.scratch.iterdir()) == []
    assert sources(vm) == before if vm.active else sources(vm)["stored"] == before["stored"]


def test_full_and_increments(vm, runs, same, tmp_path):
    before, life = sources(vm), vm.domain.ID()
    assert [kind for kind, *_ in before["live"]] == ["file", "block", "block", "file" if confined() else "volume"]
    layers, parent = [], None
    for number in range(3):
        for disk in vm.targets():
            vm.io(disk, f"write -P {number + 1} {number + 1}M 64k", f"write -z {number * 64}k 64k")
        truth = vm.copy_truth(tmp_path / f"truth{number}")
        with runs.take(runs.run(vm, parent)) as taken:
            for disk in vm.targets():
                vm.io(disk, "write -P 0x77 5M 64k")
            assert all(kind == "file" for kind, *_ in sources(vm)["stored"])
            layers.append(runs.keep(taken, tmp_path / f"layer{number}"))
        same(layers, truth)
        assert [disk.whole for disk in taken.prepared.disks] == [number == 0, True, number == 0, number == 0]
        plain(runs, vm, before)
        parent = taken
    assert vm.domain.ID() == life, "its QEMU has not died"
    vm.destroy()
    vm.start()
    for disk in vm.targets():
        vm.io(disk, "read -P 0x77 5M 64k")


@pytest.mark.parametrize("meanwhile", ["off", "started-again"])
def test_what_a_dead_run_has_left_is_merged_by_a_recovery(vm, runs, same, tmp_path, meanwhile):
    before = sources(vm)
    with runs.take(runs.run(vm)) as full:
        layer = runs.keep(full, tmp_path / "layer")
    with runs.left_alone(runs.run(vm, full)):
        for disk in vm.targets():
            vm.io(disk, "write -P 2 2M 1M")
    assert len(runs.hypervisor.find(vm.name).remarks) == 4
    vm.destroy()
    own = runs.hypervisor.scratch
    if meanwhile == "off":  # and another configuration does it: the VM's definition tells of the overlays
        runs.hypervisor.scratch = own.with_name("another")
    else:
        vm.start()
        for disk in vm.targets():
            vm.io(disk, "read -P 2 2M 1M", "write -P 3 4M 1M")
        with Connection(runs.hypervisor.uri) as connection:
            # The profile of a VM that was started on its overlay keeps it there until it is off.
            if denies_merges(connection, connection.domain(vm.uuid)):
                vm.destroy()
    done = runs.recover(vm)
    assert sum("merged the overlay" in line for line in done) == 4
    runs.hypervisor.scratch = own
    runs.recover(vm)
    assert runs.recover(vm) == ()
    plain(runs, vm, before)
    truth = vm.copy(tmp_path / "truth")
    with runs.take(runs.run(vm, full)) as taken:
        same([layer, runs.keep(taken, tmp_path / "above")], truth)
    assert [disk.whole for disk in taken.prepared.disks] == [False, True, False, False]


def test_a_device_that_is_another_one_by_now_is_not_written_to(lab, loops, runs):
    """The host has lost its power, and its devices have other names: what the guest wrote must not go into another."""
    device = loops["vdb"]
    vm = lab.vm(["raw:8"], iothread="disk", devices={"vda": device})
    with runs.left_alone(runs.run(vm)):
        vm.io("vda", "write -P 2 2M 1M")
    assert [disk.lies_on for disk in runs.hypervisor.find(vm.name).disks] == [str(device)]
    vm.destroy()
    other = lab.folder / "loop-other"
    other.write_bytes(b"x" * 8 * MiB)
    subprocess.run(["losetup", "--detach", device], check=True)
    subprocess.run(["losetup", device, other], check=True)
    with pytest.raises(HypervisorError, match=f"{device} is another device now") as told:
        runs.recover(vm)
    assert f"loop/backing_file {other}" in told.value.message
    assert other.read_bytes() == b"x" * 8 * MiB
    subprocess.run(["losetup", "--detach", device], check=True)
    subprocess.run(["losetup", device, lab.folder / "loop-vdb"], check=True)
    runs.recover(vm)
    assert device.read_bytes()[2 * MiB : 3 * MiB] == b"\2" * MiB
    assert list(runs.hypervisor.scratch.iterdir()) == []


def test_whoever_merges_into_a_device_that_is_being_read_ends_the_backup(vm, runs, wait_for):
    """libvirt gives a VM device nodes of its own, so no lock keeps it from that."""
    before = sources(vm)
    with pytest.raises(Busy, match="disk vdb was merged"), runs.take(runs.run(vm)) as taken:
        vm.io("vdb", "write -P 2 2M 1M")
        vm.commit("vdb")
        wait_for(lambda: taken.ctx.cancelled, "the watch")
        taken.ctx.check()
    plain(runs, vm, before)
    vm.io("vdb", "read -P 2 2M 1M")


def test_another_configuration_does_not_merge_into_a_device_that_is_being_read(vm, runs, tmp_path):
    """No lock keeps it off, so the backup would have been given up for it."""
    with runs.take(runs.run(vm)) as taken, Connection(runs.hypervisor.uri) as connection:
        domain = connection.domain(vm.uuid)
        for disk in ("vdb", "vdc"):
            with pytest.raises(Busy, match="is still read by a backup"):
                Merger(connection, domain, tmp_path, lambda: None).merge_all(stacks(domain)[disk])
        runs.keep(taken, tmp_path / "layer")


def test_a_vm_that_is_started_on_its_device_while_that_is_read_ends_the_backup(lab, loops, runs, wait_for):
    """A file's lock would keep it off. What it wrote before lies in an overlay that nothing uses, and is told."""
    vm = lab.vm(["raw:8"], iothread="disk", devices={"vda": loops["vdb"]})
    old = vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    with pytest.raises(HypervisorError, match="the VM does not use it"), runs.take(runs.run(vm)) as taken:
        vm.io("vda", "write -P 2 2M 1M")
        vm.destroy()
        vm.connection.defineXML(old)
        vm.start()
        wait_for(lambda: taken.ctx.cancelled, "the watch")
        taken.ctx.check()
    assert isinstance(taken.ctx.failure, Busy)
    (name,) = overlays(runs, vm)
    told = f"{name} holds what the VM has written, and the VM does not use it"
    wait_for(lambda: any(one.endswith(told) for one in runs.hypervisor.find(vm.name).remarks), "the remark")
    vm.destroy()  # before its device goes


def test_a_device_that_grows_meanwhile(vm, runs, loops, same, tmp_path, lab):
    """As by lvextend, and a resize of the guest's disk after it or none: a device's size is its own."""
    before = sources(vm)

    def grow(size: int) -> None:
        with (lab.folder / "loop-vdb").open("r+b") as file:
            file.truncate(size * MiB)
        subprocess.run(["losetup", "--set-capacity", loops["vdb"]], check=True)

    with runs.take(runs.run(vm)):
        grow(10)
        vm.domain.blockResize("vdb", 10 * MiB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
        vm.io("vdb", "write -P 2 9M 64k")
    plain(runs, vm, before)
    vm.io("vdb", "read -P 2 9M 64k")
    with runs.take(runs.run(vm)):
        grow(12)
        vm.io("vdb", "write -P 3 8M 64k")
    plain(runs, vm, before)
    vm.io("vdb", "read -P 3 8M 64k")
    with runs.take(runs.run(vm)) as taken:
        grow(14)
        vm.io("vdb", "write -P 4 7M 64k")
        vm.destroy()
    plain(runs, vm, before)
    truth = vm.copy(tmp_path / "truth")
    assert truth["vdb"].stat().st_size == 14 * MiB
    with runs.take(runs.run(vm)) as taken:
        same([runs.keep(taken, tmp_path / "layer")], truth)


def test_a_device_needs_room_in_scratch_alone(loops, tmp_path):
    """For what the guest writes; /dev has none to give, and the merge needs none."""
    overlay = str(tmp_path / "overlays" / "not there yet" / "overlay")
    growing = Growing.of("vdb", overlay, str(loops["vdb"]), 8 * MiB)
    assert (growing.spread, growing.home) == (0, growing.beside)
    require_room("web1", [growing], {"vdb": 8 * MiB})
    with pytest.raises(TargetFull, match="not there yet"):
        require_room("web1", [growing], {"vdb": 1 << 60})


def test_scratch_in_memory_is_refused(vm, runs, tmpfs):
    runs.hypervisor.scratch = tmpfs(64) / "scratch"
    with pytest.raises(UnsupportedOperation, match="in memory"), runs.take(runs.run(vm)):
        pass
    vm.untouched()


def test_a_pool_that_is_stopped(vm, runs, pool, same, tmp_path):
    """While it is, nobody tells which file a volume is; a run that has begun ends well."""
    before = sources(vm)
    pools = vm.connection.storagePoolLookupByName(pool)
    xml = pools.XMLDesc()
    with runs.take(runs.run(vm)) as taken:
        vm.io("vdd", "write -P 2 2M 1M")
        pools.destroy()
    plain(runs, vm, before)
    with pytest.raises(UnsupportedOperation, match="is the storage pool of .* active"), runs.take(runs.run(vm, taken)):
        pass
    vm.connection.storagePoolCreateXML(xml, 0)
    vm.io("vdd", "read -P 2 2M 1M")


def test_a_volume_below_two_overlays_keeps_its_name(lab, runs, pool):
    """Where a merge was not possible, and the VM is off when it is."""
    vm = lab.vm(["qcow2:8"], iothread="disk", start=False)
    put_into_pool(vm, "vda", pool)
    vm.start()
    before, file = sources(vm), vm.disk("vda")
    for number in range(2):
        with keep_closed([file] if number else []), runs.left_alone(runs.run(vm)):
            vm.io("vda", f"write -P {number + 1} {number + 1}M 1M")
    assert len(list(file.parent.glob("*.temporary.qcow2"))) == 2
    vm.destroy()
    runs.recover(vm)
    assert sources(vm)["stored"] == before["stored"]
    vm.start()
    vm.io("vda", "read -P 1 1M 1M", "read -P 2 2M 1M")


def test_a_volume_in_snapshot_mode(lab, runs, pool, same, tmp_path):
    """Overlays that stay between backups lie beside its file, too."""
    vm = lab.vm(["qcow2:8"], start=False)
    put_into_pool(vm, "vda", pool)
    vm.start()
    before, layers, parent = sources(vm), [], None
    for number in range(2):
        vm.io("vda", f"write -P {number + 1} {number + 1}M 64k")
        truth = vm.copy_truth(tmp_path / f"truth{number}")
        with runs.take(runs.run(vm, parent, settings={"INCREMENT_MODE": "SNAPSHOT"})) as parent:
            layers.append(runs.keep(parent, tmp_path / f"layer{number}"))
        same(layers, truth)
        assert [disk.whole for disk in parent.prepared.disks] == [number == 0]
    runs.hypervisor.forget(vm.identity)
    assert sources(vm) == before
