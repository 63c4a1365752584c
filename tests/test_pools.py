"""``vmkeep restore --pool``: into a folder pool of a real libvirt, and onto devices.

Volumes of devices are made by libvirt's own ``test`` driver, which has the pools and the calls of the real one and no
volume manager behind it; the device itself is a real one, at the path that libvirt gives the volume.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from xml.etree import ElementTree

import libvirt
import pytest

from lab.domain_xml import DiskSpec
from lab.host import Host, size_of
from lab.loop import loop_device
from lab.vm import same
from vmkeep import config
from vmkeep import restore as work
from vmkeep.workplace import Workplace

MIB = 1 << 20
SIZE = 4 * MIB + 512
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def host(make_vm, libvirt_uri: str, vm_folder: Path) -> Host:
    disks = [DiskSpec(target="vda", size=8 * MIB), DiskSpec(target="vdb", size=SIZE)]
    vm = make_vm(disks, label="pool")
    vm.io("vda", "write -P 0x55 1M 2M")
    vm.io("vdb", "write -P 0x11 0 2M", f"write -P 0x12 {SIZE - 512} 512")
    return Host(vm_folder, vm, libvirt_uri, driver="lab")


@pytest.fixture
def folder_pool(libvirt_uri: str, vm_folder: Path, vm_prefix: str) -> Iterator[libvirt.virStoragePool]:
    connection = libvirt.open(libvirt_uri)
    folder = vm_folder / "pool"
    folder.mkdir(mode=0o711)
    pool = connection.storagePoolCreateXML(
        f"<pool type='dir'><name>{vm_prefix}pool</name><target><path>{folder}</path></target></pool>"
    )
    yield pool
    pool.destroy()
    connection.close()


def test_disks_become_volumes_of_a_folder_pool_and_a_vm_is_defined_on_them(host: Host, folder_pool, vm_folder: Path):
    truth = host.note_truth("first")
    host.backup()
    pool, folder = folder_pool, vm_folder / "pool"
    somebody_elses = folder / "copy-disk-vdb.qcow2"
    somebody_elses.write_bytes(b"not ours")
    refused = host.run("restore", "1", "--pool", pool.name(), "--to", str(vm_folder / "to"), "--name", "copy")
    assert refused.code == 2
    assert f"{somebody_elses}: exists already" in refused.err
    assert (somebody_elses.read_bytes(), (vm_folder / "to").exists()) == (b"not ours", False)

    (table,) = (vm_folder / "store").glob("*/sums.vdb")
    held = table.read_bytes()
    table.write_bytes(bytes(len(held)))
    failed = host.run("restore", "1", "--pool", pool.name(), "--to", str(vm_folder / "to"))
    assert failed.code == 8, failed.err
    assert (list(folder.iterdir()), (vm_folder / "to").exists()) == ([somebody_elses], False)
    table.write_bytes(held)

    name = f"{host.vm.name}-copy"
    options = ["--pool", pool.name(), "--to", str(vm_folder / "to"), "--name", name, "--define"]
    made = host.ask("restore", "1", *options)
    paths = {one["id"]: Path(one["path"]) for one in made["disks"]}
    assert paths == {disk: folder / f"{name}-disk-{disk}.qcow2" for disk in truth}
    assert (made["pool"], made["xml"]) == (pool.name(), str(vm_folder / "to" / f"{name}.xml"))
    assert [path.name for path in (vm_folder / "to").iterdir()] == [f"{name}.xml"]
    assert {path.name for path in paths.values()} <= set(pool.listVolumes()), "libvirt lists them without being asked"
    assert all(size_of(path) == size_of(truth[disk]) and same(path, truth[disk]) for disk, path in paths.items())
    copy = host.vm.connection.lookupByUUIDString(made["uuid"])
    try:
        sources = [one.get("file") for one in ElementTree.fromstring(copy.XMLDesc()).iterfind("devices/disk/source")]
        assert sources == [str(path) for path in paths.values()]
    finally:
        copy.undefine()
    assert host.run("restore", "1", *options).code == 2, "nothing is overwritten"


@pytest.fixture
def devices(vm_prefix: str, vm_folder: Path) -> Iterator[tuple[libvirt.virStoragePool, Path]]:
    """A pool of kind logical, and where the devices of its volumes lie."""
    connection = libvirt.open("test:///default")  # lives as long as a connection to it does
    pool = connection.storagePoolDefineXML(
        f"<pool type='logical'><name>{vm_prefix}vg</name><source><name>{vm_prefix}vg</name></source></pool>"
    )
    pool.create()
    folder = Path("/dev") / f"{vm_prefix}vg"
    folder.mkdir()
    with ExitStack() as loops:
        for disk in ("vda", "vdb"):
            left = b"\xaa" * 10 * MIB  # by another volume
            made = loops.enter_context(loop_device(vm_folder / f"device-{disk}", left))
            (folder / f"copy-disk-{disk}").symlink_to(made)
        yield pool, folder
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    pool.destroy()
    pool.undefine()
    connection.close()


def test_disks_become_devices_and_a_failed_restore_removes_them(
    host: Host, devices, vm_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    pool, folder = devices
    truth = host.note_truth("first")
    host.backup()
    monkeypatch.setattr(sys, "path", [str(vm_folder / "installed"), *sys.path])
    host.uri = "test:///default"
    host.configure()
    place = Workplace(config.load(host.config))
    to = vm_folder / "to"

    with pytest.raises(Exception, match="get disks raw"):
        work.restore(place, "1", folder=to, name="copy", pool=pool.name(), form="qcow2")
    (table,) = (vm_folder / "store").glob("*/sums.vdb")
    held = table.read_bytes()
    table.write_bytes(bytes(len(held)))
    with pytest.raises(Exception, match=r"sums\.vdb is not what was written"):
        work.restore(place, "1", folder=to, name="copy", pool=pool.name())
    assert (pool.listVolumes(), to.exists()) == ([], False)
    table.write_bytes(held)

    made = work.restore(place, "1", folder=to, name="copy", pool=pool.name())
    assert {disk.id: disk.path for disk in made.disks} == {disk: folder / f"copy-disk-{disk}" for disk in truth}
    for disk in made.disks:
        expected = truth[disk.id].read_bytes()
        assert disk.path.read_bytes() == expected + bytes(10 * MIB - len(expected)), "and nothing of others behind it"
        assert pool.storageVolLookupByName(disk.path.name).info()[1] == disk.virtual_size
    root = ElementTree.fromstring(made.definition.read_text())
    assert [one.attrib for one in root.iterfind("devices/disk/source")] == [
        {"dev": str(folder / f"copy-disk-{disk}")} for disk in truth
    ]
    assert {one.get("type") for one in root.iterfind("devices/disk")} == {"block"}
    assert {one.get("type") for one in root.iterfind("devices/disk/driver")} == {"raw"}
    with pytest.raises(Exception, match="there is a volume copy-disk-vda already"):
        work.restore(place, "1", folder=vm_folder / "other", name="copy", pool=pool.name())
    assert sorted(pool.listVolumes()) == ["copy-disk-vda", "copy-disk-vdb"]
