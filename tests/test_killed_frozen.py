"""kill -9 of vmkeep, and of the process that guards its run, while the guest's agent holds its file systems.

Then the guest is thawed (by the guard, by `recover`, or by the next backup), goes on writing, and every backup that
was reported done is whole: its file system needs no replay, and its other disk holds what it held.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import libvirt
import libvirt_qemu
import pytest

from lab import kernel
from lab.domain_xml import DiskSpec
from lab.host import Host, stopped, wait_until
from lab.vm import same

MIB = 1 << 20
pytestmark = pytest.mark.timeout(600)  # the guest has to start; on a loaded machine it takes its time

STEPS = {
    "the freeze is noted": "backupcore_libvirt.freeze_record:write return",
    "before the agent is asked": "backupcore_libvirt.freeze:_rest call",
    "the file systems are frozen": "backupcore_libvirt.freeze:_rest return",
    "the instant, frozen": "backupcore_libvirt.connection:Domain.begin_backup return",
    "before the thaw": "backupcore_libvirt.freeze:_let_go call",
    "the file systems are thawed": "backupcore_libvirt.freeze:_let_go return",
    "the freeze is forgotten": "backupcore_libvirt.freeze_record:remove return",
}
FROZEN = ("the file systems are frozen", "the instant, frozen", "before the thaw")
"""Those at which nothing but a thaw lets the guest go on."""


@dataclass(frozen=True)
class Case:
    """One kill: at which step, whether its guard is killed with it, and whether `recover` puts it right."""

    step: str
    guard: bool
    recover: bool


@pytest.fixture
def host(make_vm, libvirt_uri: str, vm_folder: Path) -> Iterator[Host]:
    ext4 = vm_folder / "ext4.raw"
    kernel.make_ext4(ext4, 48 * MIB)
    vm = make_vm(
        # The guest has no driver for the second one, so what it holds is known.
        [DiskSpec(target="vda", size=48 * MIB, content=ext4), DiskSpec(target="sda", size=16 * MIB, bus="scsi")],
        label="frozen",
        kernel=kernel.files(agent=True),
        memory_mib=192,
        devices=kernel.AGENT_CHANNEL,
    )
    vm.wait_for_console("lab: wrote 10")
    made = Host(vm_folder, vm, libvirt_uri, driver="lab")
    wait_until(lambda: status(made) == "thawed", "the agent to answer")
    made.ask("vm", "updateconf", vm.name, "--fs-freeze", "AGENT")
    yield made
    if status(made) == "frozen":
        agent(made, "guest-fsfreeze-thaw")


def agent(host: Host, command: str) -> object:
    return json.loads(libvirt_qemu.qemuAgentCommand(host.vm.domain, json.dumps({"execute": command}), 5, 0))["return"]


def status(host: Host) -> object:
    """thawed, frozen, or None while the agent does not answer."""
    with suppress(libvirt.libvirtError):
        return agent(host, "guest-fsfreeze-status")
    return None


def kill(host: Host, case: Case) -> None:
    process = host.start("backup", host.vm.name, at=STEPS[case.step], stop=True)
    wait_until(partial(stopped, process.pid), f"{case}: the step")
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    found = [int(pid) for listed in children for pid in listed.read_text().split()]
    guards = [pid for pid in found if b"release.start" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    if case.step in FROZEN:
        assert len(guards) == 1, case
        assert status(host) == "frozen", case
    if case.guard:
        for pid in guards:
            os.kill(pid, signal.SIGKILL)
    process.kill()
    assert host.end(process).code == -signal.SIGKILL, case


def matrix(host: Host, cases: Sequence[Case]) -> None:
    truths = {}

    def backup(name: str) -> None:
        truth = host.note_truth(name)["sda"]
        taken = host.backup()
        assert taken["consistency"] == "filesystem", name
        truths[taken["increment"]] = truth

    def writes_on(case: Case) -> None:
        assert status(host) == "thawed", case
        before = host.vm.console().count("lab: wrote")
        wait_until(lambda: host.vm.console().count("lab: wrote") > before, f"{case}: the guest to write on")

    backup("first")
    for number, case in enumerate(cases):
        host.vm.io("sda", f"write -P {number % 250 + 1} {number % 15}M 640k")
        kill(host, case)
        if not case.guard:
            wait_until(lambda: status(host) == "thawed", f"{case}: the guard to thaw the guest")
        elif case.step in FROZEN:
            assert status(host) == "frozen", case
        if case.recover:
            done = host.run("recover", host.vm.name)
            assert done.code == 0, f"{case}: {done.err}"
            assert host.left() == [], case
            writes_on(case)
            host.vm.io("sda", f"write -P {number % 250 + 2} {number % 15}M 4k")
        backup(str(number))
        assert host.left() == [], case
        writes_on(case)
    for one in host.recorded():
        if one.id in truths:
            whole(host, one.image, one.id, truths[one.id])


def whole(host: Host, image: int, increment: int, truth: Path) -> None:
    disks = host.restored(image, increment)
    assert same(disks["sda"], truth), increment
    raw = host.folder / "ext4.restored"
    subprocess.run(["qemu-img", "convert", "-O", "raw", disks["vda"], raw], check=True)
    superblock = subprocess.run(["/sbin/dumpe2fs", "-h", raw], capture_output=True, text=True, check=True).stdout
    assert "needs_recovery" not in superblock, increment
    check = subprocess.run(["/sbin/e2fsck", "-fn", raw], capture_output=True, text=True, check=False)
    assert check.returncode == 0, f"{increment}: {check.stdout}"


def test_killed_with_its_guard_while_the_file_systems_are_frozen(host: Host):
    matrix(host, [Case("the instant, frozen", guard=True, recover=True)])


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_killed_at_every_step_of_a_freeze(host: Host):
    matrix(host, [Case(*values) for values in itertools.product(STEPS, (False, True), (True, False))])
