"""A backup that is a unit of systemd's, as the README sets it up, and that systemd ends: its whole cgroup at once."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.domain_xml import DiskSpec
from lab.fixtures import MakeVM
from lab.host import RUNNING, Host, stopped, wait_until

_MIB = 1 << 20
_STEP = "backupcore.disk.reader.remote:RemoteDisk.read return"
_UNIT = "backup-of-the-tests.service"
# The promise is 10 s; a host of the tests is an emulated machine, and its VMs are emulated once more.
_RELEASED_SECONDS = 60
pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def host(make_vm: MakeVM, libvirt_uri: str, vm_folder: Path) -> Iterator[Host]:
    vm = make_vm([DiskSpec(target="vda", size=32 * _MIB)])
    vm.io("vda", "write -P 0x55 0 24M")
    yield Host(vm_folder, vm, libvirt_uri, driver="lab")
    log = subprocess.run(["journalctl", "--no-pager", "-u", _UNIT], capture_output=True, text=True, check=False)
    print(log.stdout)  # pytest shows it beside a failure
    # One that a failed test has left would be in the way of the next; and the unit is forgotten, however it ended.
    for command in (["kill", "--kill-whom=all", "--signal=KILL", _UNIT], ["stop", _UNIT], ["reset-failed", _UNIT]):
        subprocess.run(["systemctl", *command], capture_output=True, check=False)


def _guards() -> list[str]:
    """The scopes of guards, each of one run, that have a process."""
    asked = ["systemctl", "list-units", "--plain", "--no-legend", "--state=active", "backupcore-guard-*.scope"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()


def _in_mid_backup(host: Host, start_unit: Callable[..., list[str]]) -> None:
    """Start a backup as a unit, and come back when it stands still while its disk is read."""
    arguments = ["-m", "lab.kill_at", _STEP, "vmkeep", "--config", str(host.config), "backup", host.vm.name]
    subprocess.run(start_unit(*arguments), check=True)
    asked = ["systemctl", "show", "--value", "--property", "MainPID", _UNIT]
    process = int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    wait_until(lambda: stopped(process), "the backup comes to its step", 120)
    assert host.vm.domain.jobInfo()[0]
    assert len(_guards()) == 1, "it has left the unit"


@pytest.fixture
def start_unit(host: Host) -> Callable[..., list[str]]:
    python = sys.executable
    variables = {name: host.environment[name] for name in ("PATH", "PYTHONPATH")}
    given = [part for name, value in {**variables, "LAB_AT": "stop"}.items() for part in ("-E", f"{name}={value}")]

    def command(*arguments: str) -> list[str]:
        return ["systemd-run", "--quiet", f"--unit={_UNIT}", "--service-type=exec", *given, python, *arguments]

    return command


@pytest.mark.parametrize(
    "ending",
    [["systemctl", "stop", _UNIT], ["systemctl", "kill", "--kill-whom=all", "--signal=KILL", _UNIT]],
    ids=["stopped", "killed"],
)
def test_the_guest_goes_on(
    host: Host,
    start_unit: Callable[..., list[str]],
    ending: list[str],
    record_property: Callable[[str, object], None],
) -> None:
    _in_mid_backup(host, start_unit)
    ended = time.monotonic()
    subprocess.run(ending, check=True)
    wait_until(lambda: not host.vm.domain.jobInfo()[0], "the guest is released", _RELEASED_SECONDS)
    seconds = time.monotonic() - ended
    record_property(f"released after {' '.join(ending)}", f"{seconds:.1f} s")
    assert seconds < _RELEASED_SECONDS
    wait_until(lambda: not _guards(), "the guard has ended")
    assert host.vm.domain.state()[0] == RUNNING
    host.vm.io("vda", "write -P 0x66 0 24M")  # all that scratch would have had to hold
    assert host.backup()["type"] == "FULL"
    assert host.left() == []
