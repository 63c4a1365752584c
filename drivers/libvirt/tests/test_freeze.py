"""The guest at rest for the one call that fixes the instant, and on its way again whatever happens."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import libvirt
import pytest

from backupcore.errors import HypervisorError, UnsupportedOperation
from backupcore.model import Outcome, RunState
from backupcore_libvirt import freeze_record
from backupcore_libvirt.connection import Connection, Domain
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.freeze import Freeze, frozen, release
from backupcore_libvirt.plugin import Libvirt
from backupcore_libvirt.release.guard import Guard
from backupcore_libvirt.scratch import Owner
from lab.kernel import AGENT_CHANNEL
from lab.patience import patient

MiB = 1 << 20
# While the guest stands still libvirt compiles the VM's AppArmor profile anew, once for each disk.
LIMIT = patient(10)
AGENT = {"FS_FREEZE": "AGENT", "FREEZE_TIMEOUT": f"{LIMIT:.0f}"}
SUSPEND = {"FS_FREEZE": "SUSPEND", "FREEZE_TIMEOUT": f"{LIMIT:.0f}"}
FALLBACK = {"FS_FREEZE_FALLBACK": "YES"}


def ext4(image: Path) -> str:
    """What its superblock says."""
    return subprocess.run(["/sbin/dumpe2fs", "-h", image], capture_output=True, text=True, check=True).stdout


def refuse(runs, run, kind, match):
    """prebackup and estimate refuse the run; the guest is as it was."""
    with pytest.raises(kind, match=match):
        runs.hypervisor.estimate(run)
    with pytest.raises(kind, match=match) as refused, runs.take(run):
        pass
    return refused.value


def test_file_systems_frozen_by_the_agent_need_no_journal_replay(agent_guest, runs, restored, tmp_path):
    images = {}
    for name, settings in (("frozen", AGENT), ("crash", {})):
        with runs.take(runs.run(agent_guest, settings=settings)) as taken:
            layer = runs.keep(taken, tmp_path / name)
            assert agent_guest.status() == "thawed", "the freeze lasts for the call, not for the backup"
        images[name] = restored([layer["vda"]], tmp_path / f"{name}.raw")
        prepared = taken.prepared
        if settings:
            assert prepared.consistency == "filesystem"
            assert 0 < prepared.frozen_seconds < LIMIT
        else:
            assert (prepared.consistency, prepared.frozen_seconds) == ("crash", 0.0)
    assert "needs_recovery" not in ext4(images["frozen"])
    check = subprocess.run(["/sbin/e2fsck", "-fn", images["frozen"]], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout
    assert "needs_recovery" in ext4(images["crash"]), "else the above proves nothing"


def test_a_suspended_guest_stands_still_for_the_call(small, runs):
    with runs.take(runs.run(small, settings=SUSPEND)) as taken:
        assert small.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
    assert taken.prepared.consistency == "paused"
    assert 0 < taken.prepared.frozen_seconds < LIMIT


def test_a_vm_that_somebody_has_paused_stays_paused(small, runs, caplog):
    small.domain.suspend()
    with runs.take(runs.run(small, settings=SUSPEND)) as taken:
        assert (taken.prepared.consistency, taken.prepared.frozen_seconds) == ("paused", 0.0)
    error = refuse(runs, runs.run(small, settings=AGENT), UnsupportedOperation, "is paused, so its agent cannot freeze")
    assert f"virsh resume {small.name}" in error.hint
    with caplog.at_level(logging.WARNING), runs.take(runs.run(small, settings=AGENT | FALLBACK)) as taken:
        assert taken.prepared.consistency == "paused"
    assert "the backup goes on without it" in caplog.text
    assert small.domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED


def test_a_vm_without_a_guest_agent(lab, small, runs, caplog):
    without = lab.vm(more=AGENT_CHANNEL)
    refuse(runs, runs.run(small, settings=AGENT), UnsupportedOperation, "has no channel for a guest agent")
    error = refuse(runs, runs.run(without, settings=AGENT), HypervisorError, "no guest agent is connected")
    assert "--fs-freeze SUSPEND" in error.hint
    for vm in (small, without):
        vm.untouched()
        caplog.clear()
        with caplog.at_level(logging.WARNING), runs.take(runs.run(vm, settings=AGENT | FALLBACK)) as taken:
            assert (taken.prepared.consistency, taken.prepared.frozen_seconds) == ("crash", 0.0)
        assert "the backup goes on without it (FS_FREEZE_FALLBACK=YES)" in caplog.text


@pytest.fixture
def agent_stopped(agent_guest, wait_for) -> Iterator[None]:
    """The agent's process is stopped in the guest, and goes on after the test: once the guest sees its disk grow."""
    script = """pid=$(cat /tmp/qemu-ga.pid); size=$(cat /sys/block/vda/size); kill -STOP $pid
        echo "lab: agent stopped" > /dev/console
        while [ "$size" = "$(cat /sys/block/vda/size)" ]; do usleep 50000; done; kill -CONT $pid"""
    size = agent_guest.domain.blockInfo("vda")[0]
    agent_guest.agent("guest-exec", path="/bin/sh", arg=["-c", script])
    agent_guest.wait_for_console("lab: agent stopped")
    yield
    agent_guest.domain.blockResize("vda", size + MiB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    wait_for(lambda: agent_guest.status() == "thawed", "the agent goes on", 60)


def test_an_agent_that_does_not_answer_is_noticed_before_the_guest_is_touched(agent_guest, agent_stopped, runs):
    run = runs.run(agent_guest, settings=AGENT)
    with pytest.raises(HypervisorError, match="not responding|didn't respond") as refused, runs.take(run):
        pass
    assert "Restart it in the guest" in refused.value.hint
    agent_guest.untouched()


def test_a_freeze_of_somebody_else_is_left_alone(agent_guest, runs):
    agent_guest.agent("guest-fsfreeze-freeze")
    try:
        error = refuse(runs, runs.run(agent_guest, settings=AGENT), HypervisorError, "somebody else has frozen")
        assert f"virsh domfsthaw {agent_guest.name}" in error.hint
        assert agent_guest.status() == "frozen"
    finally:
        agent_guest.agent("guest-fsfreeze-thaw")


@pytest.fixture
def slow_disk(agent_guest) -> Callable[[float], None]:
    """Lets the guest write once a second, for so many seconds: a freeze has to write what is in memory first."""
    timers: list[threading.Timer] = []

    def throttle(seconds: float) -> None:
        agent_guest.domain.setBlockIoTune("vda", {"write_iops_sec": 1})
        timers.append(threading.Timer(seconds, agent_guest.domain.setBlockIoTune, ["vda", {"write_iops_sec": 0}]))
        timers[-1].start()

    yield throttle
    for timer in timers:
        timer.join()


def test_a_freeze_that_timed_out_and_takes_hold_later_is_undone(agent_guest, runs, slow_disk, wait_for):
    before = agent_guest.written()
    wait_for(lambda: agent_guest.written() > before, "the guest has written", 60)
    slow_disk(4)
    run = runs.run(agent_guest, settings=AGENT | {"FREEZE_TIMEOUT": "1"})
    failure = pytest.raises(HypervisorError, match="could not be brought to rest.*(not responding|didn't respond)")
    with failure as failed, runs.take(run):
        pass
    assert "--fs-freeze-fallback YES" in failed.value.hint
    agent_guest.untouched()
    assert agent_guest.status() == "thawed"


def hold(vm, runs, freeze: Freeze, block: Callable[[], object], kind: type[Domain] = Domain):
    """`frozen` by itself, around this block; what came of it."""
    run = runs.run(vm)
    folder = RunFolder(runs.hypervisor.scratch, run.id)
    lock = folder.make(Owner(os.geteuid(), os.getegid()), vm.uuid)
    try:
        with runs.context(run) as ctx, Connection(runs.hypervisor.uri) as connection:
            domain = kind(connection.domain(vm.uuid)._domain)
            guard = Guard(runs.hypervisor.uri, vm.uuid, vm.name, folder, ctx)
            guard.hold()
            try:
                with frozen(domain, folder, freeze, guard, ctx) as held:
                    block()
            finally:
                with guard.turn():
                    pass
            return held
    finally:
        os.close(lock)
        assert folder.remove() == [], "the record is gone"


@pytest.mark.parametrize("how", ["AGENT", "SUSPEND"])
def test_the_guest_goes_on_in_time_although_the_call_hangs(how, agent_guest, runs, wait_for, caplog):
    def hang() -> None:
        running = (
            (lambda: agent_guest.status() == "thawed")
            if how == "AGENT"
            else (lambda: agent_guest.domain.state()[0] == 1)
        )
        assert not running()
        wait_for(running, "the guard lets it go", 60)

    with pytest.raises(HypervisorError, match="did not stand still until its disks were held"):
        hold(agent_guest, runs, Freeze(how, "crash", limit=3), hang)
    with caplog.at_level(logging.WARNING):
        held = hold(agent_guest, runs, Freeze(how, "crash", fallback=True, limit=3), hang)
    assert held.consistency == "crash"
    assert "the backup goes on without it" in caplog.text


class Confined(Domain):
    """A VM that AppArmor confines."""

    def live_xml(self) -> str:
        return super().live_xml().replace("</domain>", "<seclabel type='dynamic' model='apparmor'/></domain>")


def test_a_freeze_that_was_too_short_says_what_takes_so_long_under_apparmor(small, runs, wait_for):
    def hang() -> None:
        wait_for(lambda: small.domain.state()[0] == 1, "the guard lets it go", 60)

    with pytest.raises(HypervisorError, match="did not stand still until its disks were held") as told:
        hold(small, runs, Freeze("SUSPEND", "crash", limit=1), hang, Confined)
    assert "compiles its profile anew for each of its 2 disks" in told.value.hint
    assert f"vmkeep vm updateconf {small.name} --freeze-timeout SECONDS" in told.value.hint


def never() -> None:
    pytest.fail("the call was made")


def test_a_freeze_of_somebody_else_that_came_since_it_was_looked_at(agent_guest, runs):
    agent_guest.agent("guest-fsfreeze-freeze")
    try:
        with pytest.raises(HypervisorError, match="in frozen state|has been disabled"):  # 7.2, 9.1
            hold(agent_guest, runs, Freeze("AGENT", "crash"), never)
        assert agent_guest.status() == "frozen", "not ours to thaw"
    finally:
        agent_guest.agent("guest-fsfreeze-thaw")


class NothingMounted(Domain):
    """A guest whose agent finds no file system that it could freeze."""

    def agent(self, command: str, limit: int) -> object:
        return {"guest-fsfreeze-freeze": 0, "guest-fsfreeze-status": "thawed"}[command]


def test_an_agent_that_froze_nothing_does_not_count(small, runs):
    with pytest.raises(HypervisorError, match="found no file system to freeze"):
        hold(small, runs, Freeze("AGENT", "crash"), never, NothingMounted)
    done: list[bool] = []
    held = hold(small, runs, Freeze("AGENT", "crash", fallback=True), lambda: done.append(True), NothingMounted)
    assert (held.consistency, done) == ("crash", [True])


def says(code: int, text: str) -> libvirt.libvirtError:
    error = libvirt.libvirtError(text)
    error.err = (code, libvirt.VIR_FROM_QEMU, text, libvirt.VIR_ERR_ERROR, None, None, None, -1, -1)
    return error


class LateAgent(Domain):
    """A guest whose agent is silent for a while, and then does what it was asked long ago."""

    asked: ClassVar[list[str]] = []
    code: ClassVar[int]

    def agent(self, command: str, limit: int) -> object:
        self.asked.append(command.removeprefix("guest-fsfreeze-"))
        if len(self.asked) < 4:
            raise HypervisorError("Guest agent is not responding") from says(self.code, "not responding")
        return {"status": "thawed" if "thaw" in self.asked else "frozen", "thaw": 1}[self.asked[-1]]


@pytest.mark.parametrize("code", [86, 112], ids=["libvirt 9.0", "libvirt 11.2"])
def test_an_agent_that_is_silent_for_a_while_is_asked_until_it_says_thawed(small, runs, code):
    LateAgent.asked.clear()
    LateAgent.code = code
    with pytest.raises(HypervisorError, match="could not be brought to rest: Guest agent is not responding"):
        hold(small, runs, Freeze("AGENT", "crash"), never, LateAgent)
    assert LateAgent.asked == ["freeze", "status", "status", "status", "thaw", "status"]


class RefusingAgent(Domain):
    """A guest that somebody else has frozen since it was looked at; its agent refuses in words that nobody knows."""

    asked: ClassVar[list[str]] = []

    def agent(self, command: str, limit: int) -> object:
        self.asked.append(command.removeprefix("guest-fsfreeze-"))
        if self.asked[-1] == "status":
            return "frozen"
        raise HypervisorError("nothing doing") from says(libvirt.VIR_ERR_INTERNAL_ERROR, "nothing doing")


def test_a_refusal_in_new_words_is_no_reason_to_thaw(small, runs):
    with pytest.raises(HypervisorError, match="could not be brought to rest: nothing doing"):
        hold(small, runs, Freeze("AGENT", "crash"), never, RefusingAgent)
    assert RefusingAgent.asked == ["freeze"]


class OddAgent(Domain):
    """A guest whose agent knows a third state beside thawed and frozen."""

    def agent(self, command: str, limit: int) -> object:
        assert command == "guest-fsfreeze-status", "nothing is thawed that may be somebody else's"
        return "thawing"


def test_a_state_that_nobody_knows_is_not_thawed(small, runs):
    run = runs.run(small)
    folder = RunFolder(runs.hypervisor.scratch, run.id)
    os.close(folder.make(Owner(os.geteuid(), os.getegid()), small.uuid))
    freeze_record.write(folder, freeze_record.FreezeRecord.now("AGENT", small.uuid, small.domain.ID()))
    why = "may still be frozen: its agent says 'thawing'"
    with Connection(runs.hypervisor.uri) as connection, pytest.raises(HypervisorError, match=why):
        release(OddAgent(connection.domain(small.uuid)._domain), folder, 0.5)
    assert freeze_record.read(folder) is not None, "the next run looks again"
    freeze_record.remove(folder)
    assert folder.remove() == []


def test_a_vm_that_ends_while_its_guest_stands_still(lab, runs):
    vm = lab.vm()
    with pytest.raises(HypervisorError, match="did not stand still"):
        hold(vm, runs, Freeze("SUSPEND", "crash"), vm.destroy)


def test_an_error_of_the_call_comes_out_and_the_guest_goes_on(agent_guest, runs):
    def fail() -> None:
        assert agent_guest.status() == "frozen"
        assert list(runs.hypervisor.scratch.glob("*/freeze")), "the record"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hold(agent_guest, runs, Freeze("AGENT", "crash"), fail)
    assert agent_guest.status() == "thawed"


FROZEN = """
import sys, pathlib, time
from backupcore.context import Context
from backupcore_libvirt.connection import Connection, Domain
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.scratch import Owner
from backupcore_libvirt.freeze import Freeze, frozen, release
from backupcore_libvirt.release.guard import Guard
import os
uri, scratch, folder, uuid, run, how, limit = sys.argv[1:]
with Context(pathlib.Path(folder)) as ctx, Connection(uri) as connection:
    of_run = RunFolder(pathlib.Path(scratch), run)
    of_run.make(Owner(os.geteuid(), os.getegid()), uuid)
    domain = connection.domain(uuid)
    guard = Guard(uri, uuid, domain.name, of_run, ctx)
    guard.hold()
    with frozen(domain, of_run, Freeze(how, "crash", limit=float(limit)), guard, ctx):
        print("frozen", flush=True)
        time.sleep(1000)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds the run's guest at rest, for `limit` seconds at most; killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(runs, run, how: str, limit: float = 600) -> subprocess.Popen[str]:
        arguments = [runs.hypervisor.uri, runs.hypervisor.scratch, tmp_path, run.vm.uuid, run.id, how, limit]
        process = subprocess.Popen(
            [sys.executable, "-c", FROZEN, *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "frozen\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def still(vm, how: str) -> bool:
    return vm.status() == "frozen" if how == "AGENT" else vm.domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED


def the_guard_lets_go(vm, how: str, runs, wait_for) -> None:
    wait_for(lambda: not still(vm, how), "the guard lets the guest go", 60)
    # Its last act. What removes the test's folder while it is under way finds the record gone midway, and fails.
    wait_for(lambda: not list(runs.hypervisor.scratch.glob("*/freeze")), "the guard removes the record", 10)


@pytest.mark.parametrize("how", ["AGENT", "SUSPEND"])
def test_a_run_that_is_killed_while_the_guest_stands_still(how, agent_guest, runs, holder, wait_for):
    process = holder(runs, runs.run(agent_guest), how)
    assert still(agent_guest, how)
    process.kill()
    the_guard_lets_go(agent_guest, how, runs, wait_for)


def test_a_run_that_is_killed_while_libvirtd_is_away(daemon, private, holder, wait_for):
    vm, runs = private
    name = vm.name
    process = holder(runs, runs.run(vm), "SUSPEND")
    daemon.kill()
    process.kill()
    process.wait()
    daemon.start()
    vm.connection = libvirt.open(daemon.uri)
    vm.domain = vm.connection.lookupByName(name)
    the_guard_lets_go(vm, "SUSPEND", runs, wait_for)


def kill_with_its_guard(process: subprocess.Popen[str]) -> None:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    for pid in (int(children[0]), process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("how", ["AGENT", "SUSPEND"])
def test_postbackup_in_a_fresh_process_lets_the_guest_go(how, agent_guest, runs, holder):
    dead = runs.run(agent_guest)
    kill_with_its_guard(holder(runs, dead, how))
    assert still(agent_guest, how)
    for _ in range(2):
        with runs.context(dead) as ctx:
            Libvirt(runs.hypervisor.uri, runs.hypervisor.scratch).postbackup(dead, Outcome(state=RunState.FAILED), ctx)
        shutil.rmtree(runs.folder / dead.id)
        assert not still(agent_guest, how)
        assert list(runs.hypervisor.scratch.iterdir()) == []


def test_the_next_backup_lets_the_guest_go_first(agent_guest, runs, holder, caplog):
    dead = runs.run(agent_guest)
    kill_with_its_guard(holder(runs, dead, "AGENT"))
    with caplog.at_level(logging.WARNING), runs.take(runs.run(agent_guest, settings=AGENT)) as taken:
        assert not (runs.hypervisor.scratch / dead.id).exists()
    assert f"which a dead run ({dead.id}) had left at rest" in caplog.text
    assert taken.prepared.consistency == "filesystem"


def test_a_guest_that_was_started_anew_and_paused_since_is_not_resumed(lab, runs):
    vm = lab.vm()
    dead = runs.run(vm)
    folder = RunFolder(runs.hypervisor.scratch, dead.id)
    os.close(folder.make(Owner(os.geteuid(), os.getegid()), vm.uuid))
    freeze_record.write(folder, freeze_record.FreezeRecord.now("SUSPEND", vm.uuid, vm.domain.ID()))
    vm.destroy()
    vm.start()
    vm.domain.suspend()
    with runs.context(dead) as ctx:
        runs.hypervisor.postbackup(dead, Outcome(state=RunState.FAILED), ctx)
    assert vm.domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED
    assert not folder.path.exists()


def test_a_record_that_is_not_ours_is_not_believed(needs_root, runs):
    folder = RunFolder(runs.hypervisor.scratch, "0" * 32)
    folder.path.mkdir(parents=True)
    record = freeze_record.FreezeRecord.now("SUSPEND", "00000000-0000-0000-0000-000000000001", 7)
    freeze_record.write(folder, record)
    assert freeze_record.read(folder) == record
    path = folder.path / "freeze"
    os.chown(path, 64055, 64055)
    assert freeze_record.read(folder) is None, "QEMU's user owns the folder, and may have put it there"
    for text in ("", "[]", '{"how": "DESTROY", "vm": "x", "number": 1, "boot": "x"}'):
        path.unlink()
        path.write_text(text)
        assert freeze_record.read(folder) is None
    path.unlink()
    path.symlink_to("/etc/passwd")
    assert freeze_record.read(folder) is None
