"""A guest with an operating system that writes to a journalled file system while it is backed up.

Each restored increment is what a machine leaves that lost its power at that instant: the journal brings the file
system to order, `e2fsck` finds nothing, what was synced before is there, and it boots.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from lab import kernel
from lab.domain_xml import DiskSpec, Kernel
from lab.host import Host
from lab.vm import VM

MIB = 1 << 20
pytestmark = pytest.mark.timeout(600)  # for a loaded machine
# Debian has these in /usr/sbin, which is not on every user's PATH.
TOOLS = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}


@pytest.fixture
def host(make_vm, libvirt_uri: str, vm_folder: Path, guest_kernel: Kernel) -> Host:
    ext4 = vm_folder / "ext4.raw"
    kernel.make_ext4(ext4, 96 * MIB)
    disks = [DiskSpec(target="vda", size=96 * MIB, content=ext4), DiskSpec(target="vdb", size=32 * MIB)]
    vm = make_vm(disks, label="os", kernel=guest_kernel, memory_mib=192)
    return Host(vm_folder, vm, libvirt_uri, driver="lab")


def synced(vm: VM) -> int:
    """How far the guest has written, and synced, by its own word."""
    return max(map(int, re.findall(r"lab: wrote (\d+)", vm.console())), default=0)


def written(image: Path, raw: Path) -> int:
    """Replay the journal of a copy of a restored disk, check it, and return how far the guest's count goes."""
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(image), str(raw)], check=True)
    replay = subprocess.run(["e2fsck", "-p", str(raw)], env=TOOLS, capture_output=True, text=True, check=False)
    assert replay.returncode in (0, 1), replay.stdout
    check = subprocess.run(["e2fsck", "-f", "-n", str(raw)], env=TOOLS, capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout
    command = ["debugfs", "-R", "cat /written", str(raw)]
    text = subprocess.run(command, env=TOOLS, capture_output=True, text=True, check=True).stdout
    # ext4 may have noted that the file is longer before what it is longer by: nulls, at the end only.
    listed = text.rstrip("\0").split()
    assert listed == [str(number) for number in range(1, len(listed) + 1)], "a beginning, without a gap"
    return len(listed)


def test_increments_of_a_writing_guest_are_sound_hold_a_beginning_and_boot(host: Host, make_vm, guest_kernel: Kernel):
    host.vm.wait_for_console("lab: wrote 10\n|lab: wrote 10\r")
    taken: list[tuple[int, int]] = []
    for _ in range(3):
        before = synced(host.vm)
        number = host.backup()["increment"]
        taken.append((number, before))
        host.vm.wait_for_console(rf"lab: wrote {synced(host.vm) + 20}\b")
    assert [number for number, _ in taken] == [0, 1, 2]
    last = synced(host.vm)
    raw = host.folder / "restored.raw"
    counts = []
    for number, before in taken:
        disks = host.restored(1, number)
        counts.append(written(disks["vda"], raw))
        assert before <= counts[-1] <= last + 20, "what was synced before it, and nothing from after it"
    assert counts == sorted(counts)
    assert counts[0] < counts[2]
    booted = make_vm(
        [DiskSpec(target="vda", size=96 * MIB, content=raw), DiskSpec(target="vdb", size=32 * MIB)],
        label="booted",
        kernel=guest_kernel,
        memory_mib=192,
    )
    booted.wait_for_console("lab: guest is writing")
