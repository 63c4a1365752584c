"""A Linux guest with an agent, by vmkeep: frozen, backed up, restored with its kernel, and booted again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab import kernel
from lab.domain_xml import DiskSpec
from lab.vm import VM

MIB = 1 << 20


@pytest.fixture
def vmkeep(vm_folder: Path, libvirt_uri: str, require_programs):
    """Runs vmkeep on a host with one restic datastore; its --json answer."""
    require_programs("restic", "fusermount3")
    password = vm_folder / "password"
    password.touch(mode=0o600)
    password.write_text("not-to-be-seen\n")
    config = vm_folder / "config.toml"
    config.write_text(
        f'[host]\nuri = "{libvirt_uri}"\nstate = "{vm_folder}/state"\nscratch = "{vm_folder}/scratch"\n'
        f'[datastores.nas]\ndriver = "restic"\nrepository = "{vm_folder}/repository"\n'
        f'password_file = "{password}"\n'
    )

    def run(*arguments: object) -> Any:
        command = [sys.executable, "-m", "vmkeep", "--config", config, "--json", *arguments]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.mark.soak  # 24 s; its parts are held by the tests of drivers/libvirt
def test_a_frozen_guest_comes_back_with_its_kernel(make_vm, vm_folder, vmkeep, tmp_path):
    disk = tmp_path / "disk.raw"
    kernel.make_ext4(disk, 48 * MIB)
    linux = kernel.files(agent=True)
    vm = make_vm(
        [DiskSpec(target="vda", size=48 * MIB, content=disk)],
        kernel=linux,
        memory_mib=192,
        devices=kernel.AGENT_CHANNEL,
    )
    vm.wait_for_console("lab: wrote 10")
    vmkeep("vm", "updateconf", vm.name, "--fs-freeze", "AGENT")
    for number in range(2):
        taken = vmkeep("backup", vm.name)
        assert (taken["increment"], taken["consistency"], taken["left_out"]) == (number, "filesystem", [])
        assert 0 < taken["frozen_seconds"] <= 10
        vm.wait_for_console("lab: wrote 20")
    shown = vmkeep("image", "show", "1")["increments"]
    assert [one["consistency"] for one in shown] == ["filesystem", "filesystem"]
    vm.destroy()
    made = vmkeep("restore", "1", "--to", vm_folder / "back", "--name", f"{vm.name}-back")
    raw = tmp_path / "restored.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", made["disks"][0]["path"], raw], check=True)
    superblock = subprocess.run(["/sbin/dumpe2fs", "-h", raw], capture_output=True, text=True, check=True).stdout
    assert "needs_recovery" not in superblock
    subprocess.run(["/sbin/e2fsck", "-fn", raw], check=True, capture_output=True)
    beside = {one["artifact"]: Path(one["path"]) for one in made["beside"]}
    assert {name: path.read_bytes() for name, path in beside.items()} == {
        "kernel": linux.image.read_bytes(),
        "initrd": linux.initramfs.read_bytes(),
    }
    assert boots(vm, Path(made["xml"]))


def boots(vm: VM, xml: Path) -> bool:
    """Whether the restored definition, given a console, comes as far as the guest writing to its disk."""
    owner = vm.folder.stat()
    for path in (xml.parent, *xml.parent.iterdir()):
        shutil.chown(path, owner.st_uid, owner.st_gid)
    console = f"<serial type='file'><source path='{vm.folder}/console.log'/></serial>"
    (vm.folder / "console.log").unlink()
    again = vm.connection.createXML(xml.read_text().replace("</devices>", f"{console}</devices>"))
    try:
        back = VM(vm.connection, again, vm.folder)
        return back.wait_for_console("lab: wrote 10") is not None
    finally:
        again.destroy()
