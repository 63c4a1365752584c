"""docs/operations.md: every command in it works, in its order, on a real VM; units for systemd are what it takes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import store
from lab.domain_xml import DiskSpec
from vmkeep.cli import main

PAGE = Path(__file__).parent.parent / "docs" / "operations.md"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$|^(<!-- .*? -->)$", re.MULTILINE | re.DOTALL)
_SHELL = re.compile(r"[|><;&$`]")


class Reader:
    """Somebody who follows the guide: its paths are in `folder`, its VM is `vm`.

    With the driver ``lab`` for restic's, which spares the second that restic takes to open a repository, fifty times;
    and then simple commands of vmkeep run in this process.
    """

    def __init__(self, folder: Path, vm: str, uri: str, driver: str) -> None:
        self.folder = folder
        self.vm = vm
        self.driver = driver
        (folder / "bin").mkdir()
        (folder / "etc").mkdir()
        program = folder / "bin" / "vmkeep"
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m vmkeep "$@"\n')
        program.chmod(0o755)
        self.config = folder / "etc" / "config.toml"
        self.environment = {
            **os.environ,
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "VMKEEP_CONFIG": str(self.config),
            "LIBVIRT_DEFAULT_URI": uri,
        }
        self.here = {
            "/etc/vmkeep": folder / "etc",
            "/srv": folder,
            "/var/tmp": folder,
            "/var/lib/vmkeep": folder / "state",
            "qemu:///system": uri,
            "web1": vm,
        }
        self.ran: list[str] = []
        self._configured = False

    def placed(self, text: str) -> str:
        return re.sub("|".join(map(re.escape, self.here)), lambda found: str(self.here[found[0]]), text)

    def follow(self) -> None:
        for language, content, remark in _BLOCK.findall(PAGE.read_text()):
            if remark:
                assert "/var/lib/vmkeep is lost" in remark
                shutil.rmtree(self.folder / "state")
            elif language == "toml":
                self.configure(self.placed(content))
            elif language == "ini":
                for command in re.findall(r"^ExecStart=(.*)$", content, re.MULTILINE):
                    self.run(command.replace("%i", self.vm))
            else:
                assert language == "sh"
                for command in content.splitlines():
                    self.run(self.placed(command))

    def configure(self, content: str) -> None:
        if self.driver == "lab":
            content = re.sub(r"^password_file.*\n", "", content.replace('"restic"', '"lab"'), flags=re.MULTILINE)
            content = content.replace("repository =", "path =")
        self.config.write_text((self.config.read_text() + "\n" if self._configured else "") + content)
        self._configured = True

    def run(self, command: str) -> None:
        self.ran.append(command)
        if self.driver == "lab" and command.startswith("restic "):
            return
        if self.driver == "lab" and command.startswith("vmkeep ") and not _SHELL.search(command):
            assert main.run(shlex.split(command)[1:]) == 0, command
            return
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.fixture
def read(make_vm, libvirt_uri: str, vm_folder: Path, require_programs, monkeypatch) -> Callable[[str], Reader]:
    require_programs("virsh", "gzip")
    vm = make_vm([DiskSpec(target="vda", size=8 << 20)], label="guide")
    vm.io("vda", "write -P 0x55 1M 2M")

    def made(driver: str) -> Reader:
        if driver == "lab":
            monkeypatch.syspath_prepend(store.installed(vm_folder / "installed"))
        reader = Reader(vm_folder, vm.name, libvirt_uri, driver)
        monkeypatch.setenv("VMKEEP_CONFIG", str(reader.config))
        monkeypatch.setenv("LIBVIRT_DEFAULT_URI", libvirt_uri)
        return reader

    return made


def test_every_command_of_the_guide_works(read: Callable[[str], Reader], vm_folder: Path):
    reader = read("lab")
    reader.follow()
    assert list((vm_folder / "recovered").glob("*.qcow2"))
    assert len(reader.ran) > 40


def test_the_units_of_the_guide_are_what_systemd_takes(tmp_path: Path):
    service, timer = (content for language, content, _ in _BLOCK.findall(PAGE.read_text()) if language == "ini")
    (when,) = re.findall(r"^OnCalendar=(.*)$", timer, re.MULTILINE)
    (command,) = re.findall(r"^ExecStart=(.*)$", service, re.MULTILINE)
    assert shlex.split(command)[0] == "vmkeep"
    if shutil.which("systemd-analyze") is None:
        return  # a host without systemd: what can be read of them was
    (tmp_path / "vmkeep@.service").write_text(service.replace("=vmkeep ", "=/bin/true "))
    (tmp_path / "vmkeep@.timer").write_text(timer)
    units = [tmp_path / "vmkeep@web1.timer", tmp_path / "vmkeep@web1.service"]
    verify = ["systemd-analyze", "verify", "--man=no", *units]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert "vmkeep@" not in done.stderr, done.stderr  # an unknown key is told there, with exit code 0
    subprocess.run(["systemd-analyze", "calendar", when], check=True, capture_output=True)


@pytest.mark.timeout(600)  # fifty calls of restic, each a second and more on a loaded machine
@pytest.mark.soak
def test_every_command_of_the_guide_works_with_restic(read: Callable[[str], Reader], vm_folder: Path, require_programs):
    require_programs("restic")
    read("restic").follow()
    assert list((vm_folder / "recovered").glob("*.qcow2"))
