"""INCREMENT_MODE=SNAPSHOT from the command to the store and back, in two datastores, with a change of the mode."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab import quick_repository
from lab.domain_xml import DiskSpec
from lab.vm import VM, same

MIB = 1 << 20


@pytest.fixture
def ask(vm_folder: Path, libvirt_uri: str, require_programs):
    """vmkeep, with the datastores nas and cloud: its JSON document, and what it wrote to stderr."""
    require_programs("restic", "fusermount3")
    (vm_folder / "password").write_text("not-to-be-seen\n")
    (vm_folder / "password").chmod(0o600)
    for name in ("nas", "cloud"):
        quick_repository.make(vm_folder / name, "not-to-be-seen")
    stores = "".join(
        f'[datastores.{name}]\ndriver = "restic"\nrepository = "{vm_folder}/{name}"\n'
        f'password_file = "{vm_folder}/password"\n'
        for name in ("nas", "cloud")
    )
    config = vm_folder / "config.toml"
    config.write_text(
        f'[host]\nuri = "{libvirt_uri}"\nstate = "{vm_folder}/state"\nscratch = "{vm_folder}/scratch"\n{stores}'
    )

    def run(*arguments: str) -> tuple[Any, str]:
        done = subprocess.run(
            [sys.executable, "-m", "vmkeep", "--config", str(config), "--json", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    return run


def overlays(vm: VM) -> list[Path]:
    return [path for path in vm.folder.iterdir() if "backupcore" in path.name]


@pytest.mark.soak  # 27 s; test_killed.py takes the same way, killed and not
def test_increments_of_a_raw_disk_and_back_to_plain_files(make_vm, ask, vm_folder: Path):
    vm = make_vm([DiskSpec(target="vda", size=32 * MIB, format="raw")], label="snapshot")
    vm.io("vda", "write -P 0x11 0 4M")
    ask("vm", "updateconf", vm.name, "--increment-mode", "SNAPSHOT")
    held, found = [], []
    for number in range(2):
        vm.io("vda", f"write -P {number + 1} {number + 4}M 500k", f"discard {number}M 64k")
        held.append(vm.copy_truth(vm_folder / f"truth{number}")["vda"])
        found.append(ask("backup", vm.name, "-d", "nas")[0])
    assert [one["type"] for one in found] == ["FULL", "INCREMENT"]
    assert found[1]["warnings"] == []
    assert found[1]["read"] <= 500 * 1024 + 4 * 65536

    second, said = ask("backup", vm.name, "-d", "cloud")
    assert second["type"] == "FULL"
    assert "this VM's is in another datastore" in said
    assert len(overlays(vm)) == 1
    planned, _ = ask("backup", vm.name, "-d", "cloud", "--dry-run")
    assert (planned["type"], "one chain of increments" in planned["reason"]) == ("FULL", True)
    third, _ = ask("backup", vm.name, "-d", "nas")
    assert (third["type"], third["increment"]) == ("INCREMENT", 2)

    ask("vm", "updateconf", vm.name, "--increment-mode", "CBT")
    vm.io("vda", "write -P 9 9M 64k")
    truth = vm.copy_truth(vm_folder / "truth")
    plain, _ = ask("backup", vm.name, "-d", "nas")
    assert (plain["type"], plain["reason"]) == ("FULL", "INCREMENT_MODE=SNAPSHOT is no longer set")
    assert (overlays(vm), vm.disk("vda").name) == ([], "vda.raw")

    disks, _ = ask("restore", str(found[0]["image"]), "--increment", "1", "--to", str(vm_folder / "restored"))
    assert same(Path(disks["disks"][0]["path"]), held[1])
    disks, _ = ask("restore", str(plain["image"]), "--to", str(vm_folder / "plain"))
    assert same(Path(disks["disks"][0]["path"]), truth["vda"])
