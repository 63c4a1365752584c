"""A random life of a VM and of its backups: whatever the order, every increment that was reported done restores equal.

Writes, zeroes, discards, resizes, disks that come and go, restarts, crashes, definitions removed and made again; fulls,
increments, cancelled and killed backups, restores in place; files exchanged, merged and rebased behind our back; state
folders put back, catalogs rebuilt, hosts renamed, clocks stepped, targets unmounted and emptied: the acts lie in
``random_life``, by subject. The truth of an instant is a copy by QEMU's own tools. A failure names its seed; ``SEED=…
pytest tests/test_random.py`` takes the same decisions again (times are not repeated). With ``-s`` the end tells what
was done, and how often.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import libvirt
import pytest

from lab.domain_xml import DiskSpec
from lab.host import Host
from lab.private_libvirtd import PrivateLibvirtd
from lab.vm import VM
from tests.random_life.life import live
from tests.random_life.owner import Owner
from tests.random_life.world import World
from tests.test_killed import STEPS

MIB = 1 << 20


def hosts(folder: Path, vm: VM, uri: str) -> tuple[Host, Host]:
    """Two installations with one datastore."""
    (folder / "store").mkdir()
    return installation(folder, "a", vm, uri), installation(folder, "b", vm, uri)


def installation(folder: Path, name: str, vm: VM, uri: str) -> Host:
    (folder / name).mkdir(mode=0o711)
    return Host(folder / name, vm, uri, driver="lab", options={"path": f"{folder}/store"})


@pytest.fixture
def both(make_vm, libvirt_uri: str, vm_folder: Path) -> tuple[Host, Host]:
    disks = [
        DiskSpec(target="vda", size=24 * MIB),
        DiskSpec(target="vdb", size=8 * MIB + 512),
    ]
    return hosts(vm_folder, make_vm(disks, label="random"), libvirt_uri)


@pytest.fixture
def host(both: tuple[Host, Host]) -> Host:
    return both[0]


@pytest.fixture
def threaded(make_vm, libvirt_uri: str, vm_folder: Path) -> tuple[Host, Host]:
    """Of a VM that has its disks on an I/O thread."""
    sizes = {"vda": 24 * MIB, "vdb": 8 * MIB + 512}
    disks = [DiskSpec(target=target, size=size, driver="iothread='1'") for target, size in sizes.items()]
    return hosts(vm_folder, make_vm(disks, label="random", iothreads=1), libvirt_uri)


@pytest.mark.timeout(600)  # a loaded machine takes longer for the comparisons at the end
def test_a_random_life(both: tuple[Host, Host]):
    # As many deeds on every machine: a red `make test` is to be about the change; `make soak` looks for what is new.
    live(both, 60, deeds=60, usual=337210652)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_random_life_with_an_io_thread(threaded: tuple[Host, Host]):
    live(threaded, 40, usual=1)


@pytest.mark.soak
def test_a_long_random_life(both: tuple[Host, Host]):
    live(both, float(os.environ.get("SECONDS", "600")))


@pytest.mark.soak
def test_a_long_random_life_with_an_io_thread(threaded: tuple[Host, Host]):
    live(threaded, float(os.environ.get("SECONDS", "600")))


@pytest.mark.soak
@pytest.mark.skipif(os.geteuid() != 0, reason="a second libvirtd needs root")
def test_a_long_random_life_on_two_libvirtds(both: tuple[Host, Host], vm_folder: Path):
    with PrivateLibvirtd(vm_folder / "second") as daemon:
        there = installation(vm_folder, "c", both[0].vm, daemon.uri)
        live((*both, there), float(os.environ.get("SECONDS", "600")), second=daemon)


# What random lives have found


def test_a_disk_that_was_cut_off_before_its_full_and_grows_later(host: Host):
    """QEMU shows what lay behind the cut within the same cluster of the image, and no bitmap tells it."""
    host.vm.io("vdb", "write -P 0x55 0 6M")
    host.vm.destroy()
    path = str(host.vm.disk("vdb"))
    subprocess.run(["qemu-img", "resize", "-q", "-f", "qcow2", "--shrink", path, str(4 * MIB + 66560)], check=True)
    host.vm.start()
    host.backup()
    host.vm.domain.blockResize("vdb", 7 * MIB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    truth = host.note_truth("grown")
    taken = host.backup()
    assert (taken["type"], taken["read"] < 2 * MIB) == ("INCREMENT", True)
    assert host.differing(taken["image"], taken["increment"], truth) == []


def test_a_disk_that_only_the_running_vm_has_is_restored_with_a_definition(host: Host):
    """``virsh attach-disk --live`` leaves the stored definition, which is what a backup keeps, without the disk."""
    owner = Owner(World([host], 0))
    host.vm.domain.attachDeviceFlags(owner.spare_xml(), libvirt.VIR_DOMAIN_AFFECT_LIVE)
    host.vm.io("vdc", "write -P 0x55 1M 1M")
    truth = host.note_truth("attached")
    taken = host.backup()
    assert set(truth) == {"vda", "vdb", "vdc"}
    assert host.differing(taken["image"], taken["increment"], truth) == []


@pytest.mark.soak  # the plugin's own tests have it in 3 s
def test_a_dead_run_is_released_while_one_of_its_overlays_has_to_stay(host: Host):
    """Below the cut of a disk that has grown again nothing is merged before the next backup; no folder waits for it."""
    vm = host.vm
    host.ask("vm", "updateconf", vm.name, "--increment-mode", "SNAPSHOT")
    vm.io("vdb", "write -P 0x55 0 8M")
    host.backup()
    vm.destroy()
    command = ["qemu-img", "resize", "-q", "-f", "qcow2", "--shrink", str(vm.disk("vdb")), str(4 * MIB)]
    subprocess.run(command, check=True)
    vm.start()
    assert host.run("backup", vm.name, at=STEPS["recorded"]).code == -signal.SIGKILL
    vm.domain.blockResize("vdb", 7 * MIB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    vm.io("vdb", "write -P 0x66 5M 64k")
    recovered = host.run("recover", vm.name)
    assert (recovered.code, host.left(), len(host.overlays())) == (0, [], 3), recovered.err
    assert "was made smaller and has grown since" in recovered.err
    truth = host.note_truth("grown")
    taken = host.backup()
    assert (taken["type"], host.left(), len(host.overlays())) == ("INCREMENT", [], 2)
    assert host.differing(taken["image"], taken["increment"], truth) == []
