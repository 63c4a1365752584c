"""The processes that guard a run, and read for it, are killed, or stopped, at every step.

The guest runs within seconds, and the next backup is right.
"""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest

from lab.blocking_fs import state
from lab.domain_xml import DiskSpec
from lab.host import RUNNING, Host, wait_until
from lab.troubles import Trouble, children, free, target

MIB = 1 << 20
LIMIT = 10.0
pytestmark = pytest.mark.timeout(900)  # several backups each; on a loaded machine they take their time

STEPS = {
    "it starts": "backupcore_libvirt.release.start:main call",
    "it connects": "backupcore_libvirt.release.process:guard call",
    "it leaves the owner's unit": "backupcore_libvirt.release.own_unit:OwnUnit.wait call",
    "it is ready": "backupcore_libvirt.release.process:_Guard.work call",
    "it hears its owner": "backupcore_libvirt.release.process:_Guard._told call",
    "it watches": "backupcore_libvirt.release.process:_Guard._told return",
    "it looks at scratch": "backupcore_libvirt.scratch:scratch_room return",
    "before a client is admitted": "backupcore_libvirt.release.control:Control._admit call",
    "a client is admitted": "backupcore_libvirt.release.control:Control._admit return",
    "before the owner's turn": "backupcore_libvirt.release.process:_Guard._turn call",
}
"""Of a backup that goes well."""

LATE = {"it is the owner's turn": "backupcore_libvirt.release.process:_Guard._turn return"}
"""From where on the owner needs it no more."""

GIVING_UP = {
    "it is asked": "backupcore_libvirt.release.process:_Guard._let_go call",
    "before the mark": "backupcore.verdict:give_up call",
    "it is marked": "backupcore_libvirt.release.giving_up:mark return",
    "the clients are ended": "backupcore_libvirt.release.giving_up:end_clients return",
    "nobody is connected": "backupcore_libvirt.release.clients:wait_until_alone return",
    "the job is told to end": "backupcore_libvirt.connection:Domain.abort_job return",
    "the job has ended": "backupcore_libvirt.backup_job:end return",
    "all is released": "backupcore_libvirt.release.process:_Guard._tried call",
}
"""Of one that is given up."""

READER = {
    "it serves": "backupcore.disk.reader.service:serve call",
    "before the leave": "backupcore.disk.nbd.admission:Leave._asked call",
    "it has the leave": "backupcore.disk.nbd.admission:Leave._asked return",
    "it is connected": "backupcore.disk.nbd.handshake:connect return",
    "greeted": "backupcore.disk.nbd.handshake:Handshake._greet return",
    "between connect and GO": "backupcore.disk.nbd.handshake:Handshake._go call",
    "GO": "backupcore.disk.nbd.handshake:Handshake._go return",
    "block status": "backupcore.disk.nbd.client:Client.walk_status return",
    "a disk is mapped": "backupcore_libvirt.reading.export:layout_of return",
    "reading": "backupcore.disk.nbd.client:Client.submit return",
}
"""Of the process that reads."""

QUICK = ("it is ready", "a client is admitted")
QUICK_READER = ("it has the leave", "between connect and GO", "reading")
QUICK_GIVING_UP = ("the clients are ended", "the job is told to end")


@pytest.fixture
def host(make_vm, libvirt_uri: str, vm_folder: Path) -> Host:
    vm = make_vm([DiskSpec(target="vda", size=32 * MIB)], label="guarded")
    vm.io("vda", "write -P 0x55 1M 8M")
    return Host(vm_folder, vm, libvirt_uri, driver="lab")


def matrix(host: Host, steps: dict[str, str], how: str) -> None:
    host.backup()
    for number, (name, step) in enumerate(steps.items()):
        host.vm.io("vda", f"write -P {number + 1} {number}M 512k")
        before = len(host.recorded())
        done = host.run("backup", host.vm.name, child=step, LAB_CHILD_AT=how)
        wait_until(lambda: free(host), f"the guest to run: {name}", LIMIT)
        if name in LATE:
            assert done.code == 0, f"{name}: {done.err}"
        else:
            assert done.code == 11, f"{name}: {done.err}"
            assert "guards the guest" in done.err, name
            assert len(host.recorded()) == before, name
        truth = host.note_truth(name)
        taken = host.backup()
        assert taken["type"] == "INCREMENT", f"{name}: {taken['reason']}"
        assert host.left() == [], name
        assert host.differing(taken["image"], taken["increment"], truth) == [], name


def giving_up(host: Host, steps: dict[str, str], how: str, folder: Path) -> None:
    """The target hangs, so nobody but what listens to the guard can let the guest go."""
    with target("rsync", folder) as where:
        host.driver, host.options = "rsync", where.options
        host.configure()
        for number, (name, step) in enumerate(steps.items()):
            host.vm.io("vda", f"write -P {number + 1} {number}M 512k")
            before = len(host.recorded())
            trouble = Trouble.begin(host, where, child=step, LAB_CHILD_AT=how)
            trouble.go_on()
            trouble.time(trouble.cancel)
            assert trouble.seconds < LIMIT, name
            trouble.end(where)
            done = host.end(trouble.process)
            assert done.code in (11, 130), f"{name}: {done.err}"
            assert len(host.recorded()) == before, name
            truth = host.note_truth(name)
            taken = host.backup()
            assert host.left() == [], name
            assert host.differing(taken["image"], taken["increment"], truth) == [], name
            assert host.vm.domain.state()[0] == RUNNING


def test_killed_at_named_steps(host: Host):
    matrix(host, {name: STEPS[name] for name in QUICK} | LATE, "")


def test_killed_while_it_gives_a_run_up(host: Host, vm_folder: Path):
    giving_up(host, {name: GIVING_UP[name] for name in QUICK_GIVING_UP}, "", vm_folder)


def reading(host: Host, steps: dict[str, str]) -> None:
    """It is killed; then it is stopped, and vmkeep killed: the guard has to end both it and the job, in that order."""
    host.backup()
    for number, (name, step) in enumerate(steps.items()):
        host.vm.io("vda", f"write -P {number + 1} {number}M 512k")
        before = len(host.recorded())
        done = host.run("backup", host.vm.name, child=step)
        wait_until(lambda: free(host), f"the guest to run: {name}", LIMIT)
        assert done.code == 11, f"{name}: {done.err}"
        process = host.start("backup", host.vm.name, child=step, LAB_CHILD_AT="stop")
        wait_until(partial(a_child_stands_still, process.pid), f"the step: {name}")
        process.kill()
        wait_until(lambda: free(host), f"the guest to run: {name}", LIMIT)
        assert host.end(process).code == -signal.SIGKILL
        host.vm.io("vda", "read 0 4k")
        assert len(host.recorded()) == before, name
        truth = host.note_truth(name)
        taken = host.backup()
        assert host.left() == [], name
        assert host.differing(taken["image"], taken["increment"], truth) == [], name


def a_child_stands_still(owner: int) -> bool:
    return any(state(pid) == "T" for child in children(owner) for pid in children(child))


def test_the_reader_is_killed_or_stopped_at_named_steps(host: Host):
    reading(host, {name: READER[name] for name in QUICK_READER})


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_the_reader_is_killed_or_stopped_at_every_step(host: Host):
    reading(host, READER)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("how", ["", "stop"])
def test_killed_or_stopped_at_every_step(host: Host, how: str):
    # One that is stopped before it is ready is waited for: 30 s.
    matrix(host, STEPS | ({} if how else LATE), how)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("how", ["", "stop"])
def test_killed_or_stopped_at_every_step_of_giving_up(host: Host, vm_folder: Path, how: str):
    giving_up(host, GIVING_UP, how, vm_folder)
