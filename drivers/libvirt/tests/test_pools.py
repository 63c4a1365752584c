"""Which storage pools can be restored into; asked of libvirt's own ``test`` driver, which knows pools of every kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from backupcore.errors import BackupError, ConfigError, HypervisorError, NotFound, UnsupportedOperation
from backupcore.hypervisor import Pool
from backupcore_libvirt.plugin import Libvirt

URI = "test:///default"


@pytest.fixture
def host() -> Iterator[libvirt.virConnect]:
    connection = libvirt.open(URI)  # what is defined lives as long as any connection does
    yield connection
    for pool in connection.listAllStoragePools(0):
        if pool.name().startswith("a-"):
            if pool.isActive():
                pool.destroy()
            pool.undefine()
    connection.close()


@pytest.fixture
def hypervisor(tmp_path: Path) -> Libvirt:
    return Libvirt(uri=URI, scratch=tmp_path)


def make(host: libvirt.virConnect, kind: str, *, start: bool = True) -> str:
    name = f"a-{kind}"
    pool = host.storagePoolDefineXML(
        f"<pool type='{kind}'><name>{name}</name><source><host name='127.0.0.1'/><device path='/dev/none'/>"
        "<dir path='/'/><name>n</name></source><target><path>/srv/images</path></target></pool>"
    )
    if start:
        pool.create()
    return name


@pytest.mark.parametrize("kind", ["dir", "fs", "netfs"])
def test_folders(host, hypervisor: Libvirt, kind: str):
    name = make(host, kind)
    assert hypervisor.pool(name) == Pool(name=name, kind=kind, folder=Path("/srv/images"))
    hypervisor.refresh(hypervisor.pool(name))


def test_volumes_that_are_devices_have_exactly_the_size_and_are_never_made_twice(host, hypervisor: Libvirt):
    pool = hypervisor.pool(make(host, "logical"))
    assert pool.folder is None
    assert hypervisor.add_volume(pool, "web1-disk-vda", 1_049_088) == Path("/dev/n/web1-disk-vda")
    made = host.storagePoolLookupByName(pool.name).storageVolLookupByName("web1-disk-vda")
    assert made.info()[1:] == [1_049_088, 1_049_088]
    with pytest.raises(ConfigError, match="there is a volume web1-disk-vda already"):
        hypervisor.add_volume(pool, "web1-disk-vda", 512)
    hypervisor.remove_volume(pool, "web1-disk-vda")
    assert host.storagePoolLookupByName(pool.name).listVolumes() == []


@pytest.mark.parametrize(
    ("kind", "start", "error", "message", "hint"),
    [
        ("dir", False, HypervisorError, "a-dir is not active", "virsh pool-start a-dir"),
        ("rbd", True, UnsupportedOperation, "of kind rbd, whose volumes are neither files", "virsh vol-upload"),
        ("gluster", True, UnsupportedOperation, "of kind gluster", "virsh vol-upload"),
        ("disk", True, UnsupportedOperation, "of kind disk: no volume can be made", "--device PATH"),
        ("iscsi", True, UnsupportedOperation, "of kind iscsi", "--device PATH"),
    ],
)
def test_others_say_what_to_do_instead(
    host, hypervisor: Libvirt, kind: str, start: bool, error: type[BackupError], message: str, hint: str
):
    name = make(host, kind, start=start)
    with pytest.raises(error, match=message) as caught:
        hypervisor.pool(name)
    assert hint in caught.value.hint


def test_a_pool_that_is_not_there(host, hypervisor: Libvirt):
    make(host, "dir")
    with pytest.raises(NotFound, match="there is no storage pool 'images'") as caught:
        hypervisor.pool("images")
    assert caught.value.hint == "There are: a-dir, default-pool."
