"""The README's first backup, as it is typed: its installation has been carried out by lab/hosts/inside/start."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from lab.domain_xml import DiskSpec, domain_xml
from lab.hosts import readme
from lab.vm import VM, same

_MIB = 1 << 20
_IMAGES = Path("/var/lib/libvirt/images")


@pytest.fixture
def web1(libvirt_uri: str, tmp_path: Path) -> Iterator[VM]:
    """The VM of the README, with its disk where a user's is."""
    disk = _IMAGES / "web1.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "64M"], check=True)
    folder = _IMAGES / "web1"
    folder.mkdir()
    text = domain_xml(
        name="web1",
        folder=folder,
        disks=[(DiskSpec(target="vda", size=64 * _MIB), disk)],
        memory_mib=64,
        kernel=None,
        firmware=None,
        emulator=None,
        devices="",
    )
    connection = libvirt.open(libvirt_uri)
    vm = VM(connection, connection.defineXML(text), folder)
    try:
        vm.start()
        vm.io("vda", "write -P 0x55 1M 20M", "write -P 0x66 50M 64k")
        yield vm
    finally:
        vm.remove()
        disk.unlink()


def test_as_typed(web1: VM, tmp_path: Path) -> None:
    truth = web1.copy_truth(tmp_path / "truth")
    for command in readme.first_backup().use:
        done = subprocess.run(
            ["bash", "-euc", command], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    (restored,) = Path("/var/tmp/restored").glob("*vda*")
    assert same(restored, truth["vda"])
    assert web1.active


@pytest.mark.timeout(900)
def test_demo() -> None:
    """A full and two increments of a Linux that writes, each restored and compared."""
    done = subprocess.run(
        [sys.executable, "-m", "lab.demo"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
