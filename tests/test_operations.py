"""docs/operations.md: every command in it works, in its order, on a real VM and a real restic repository."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lab.domain_xml import DiskSpec

PAGE = Path(__file__).parent.parent / "docs" / "operations.md"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$|^(<!-- .*? -->)$", re.MULTILINE | re.DOTALL)


@pytest.mark.timeout(600)  # thirty commands, each a second of restic and more on a loaded machine
@pytest.mark.soak  # a minute and a half: it calls restic some fifty times
def test_every_command_of_the_guide_works(make_vm, libvirt_uri: str, vm_folder: Path, require_programs):
    require_programs("restic", "virsh", "gzip")
    vm = make_vm([DiskSpec(target="vda", size=8 << 20)], label="guide")
    vm.io("vda", "write -P 0x55 1M 2M")
    (vm_folder / "bin").mkdir()
    (vm_folder / "etc").mkdir()
    program = vm_folder / "bin" / "vmkeep"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m vmkeep "$@"\n')
    program.chmod(0o755)
    config = vm_folder / "etc" / "config.toml"
    environment = {
        **os.environ,
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "VMKEEP_CONFIG": str(config),
        "LIBVIRT_DEFAULT_URI": libvirt_uri,
    }
    here = {
        "/etc/vmkeep": vm_folder / "etc",
        "/srv": vm_folder,
        "/var/tmp": vm_folder,
        "/var/lib/vmkeep": vm_folder / "state",
        "qemu:///system": libvirt_uri,
        "web1": vm.name,
    }

    def placed(text: str) -> str:
        return re.sub("|".join(map(re.escape, here)), lambda found: str(here[found[0]]), text)

    def run(command: str) -> None:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"

    configured = False
    for language, content, remark in _BLOCK.findall(PAGE.read_text()):
        if remark:
            assert "/var/lib/vmkeep is lost" in remark
            shutil.rmtree(vm_folder / "state")
        elif language == "toml":
            config.write_text((config.read_text() + "\n" if configured else "") + placed(content))
            configured = True
        elif language == "ini":
            for command in re.findall(r"^ExecStart=(.*)$", content, re.MULTILINE):
                run(command.replace("%i", vm.name))
        else:
            assert language == "sh"
            for command in content.splitlines():
                run(placed(command))
    assert list((vm_folder / "recovered").glob("*.qcow2"))
