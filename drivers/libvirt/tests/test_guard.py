"""The process that guards a run: the guest goes on, whatever becomes of the run, of its readers, or of the guard."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import libvirt
import pytest

from backupcore import guard as core
from backupcore import verdict
from backupcore.context import Context
from backupcore.disk.nbd import Address, Client, ConnectionLost
from backupcore.disk.unix_socket import connect_to
from backupcore.errors import Cancelled, HypervisorError, IncrementImpossible, NotFound, TargetFull
from backupcore.model import Outcome, RunState
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.plugin import Libvirt
from backupcore_libvirt.release.clients import connected
from backupcore_libvirt.release.giving_up import Run as GuardedRun
from backupcore_libvirt.release.guard import Guard
from backupcore_libvirt.release.own_unit import OwnUnit
from backupcore_libvirt.release.watching import Watch
from backupcore_libvirt.scratch import Owner
from lab.boot_sector import boot_sector

MiB = 1 << 20
LIMIT = 10.0
"""Seconds within which a guest goes on, whatever happens."""

OWNER = """
import os, sys, pathlib
from backupcore.context import Context
from backupcore.model import VM, BackupRun, Type
from backupcore_libvirt.plugin import Libvirt
uri, scratch, folder, uuid, name, run, point, action = sys.argv[1:]
run = BackupRun(id=run, vm=VM(uuid=uuid, name=name), host="here", datastore="nas", image="0" * 32, number=0,
                point=point, type=Type.FULL)
with Context(pathlib.Path(folder)) as ctx:
    prepared = Libvirt(uri, pathlib.Path(scratch)).prebackup(run, ctx)
    print("ready", flush=True)
    sys.stdin.readline()
    exec(action)
    sys.stdin.read()
"""
READ = "prepared.artifacts[0].read_at(0, prepared.artifacts[0].size)"

CLIENT = """
import sys
from backupcore.disk.nbd import Address, Client, handshake
def stop(*_):
    print("half open", flush=True)
    sys.stdin.read()
if sys.argv[4] == "half":
    handshake.Handshake._go = stop
Client(Address(sys.argv[1], sys.argv[2], admission=sys.argv[3])).read(0, 1)
print("reading", flush=True)
sys.stdin.read()
"""


@dataclass
class Owned:
    """A run of another process, which did `prebackup` and waits for `go`."""

    process: subprocess.Popen[str]
    run: object
    folder: Path

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    @property
    def guard(self) -> int:
        return guard_of(self.process.pid)


def guard_of(owner: int) -> int:
    """The guard among an owner's children."""
    children = (
        int(pid) for listed in Path(f"/proc/{owner}/task").glob("*/children") for pid in listed.read_text().split()
    )
    return next(pid for pid in children if b"release.start" in Path(f"/proc/{pid}/cmdline").read_bytes())


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@contextmanager
def owners(runs, folder: Path) -> Iterator[Callable[..., Owned]]:
    """Starts a process that does prebackup of a VM; `action` is what it does when it is told to go on."""
    started: list[Owned] = []

    def start(vm, action: str = "") -> Owned:
        run = runs.run(vm)
        own = folder / f"owned{len(started)}"
        own.mkdir(mode=0o700)
        arguments = [runs.hypervisor.uri, runs.hypervisor.scratch, own, vm.uuid, vm.name, run.id, run.point, action]
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        started.append(Owned(process, run, own))
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return started[-1]

    yield start
    for one in started:
        with suppress(ProcessLookupError):
            os.kill(one.process.pid, signal.SIGCONT)
        one.process.kill()
        one.process.communicate()


@pytest.fixture
def owner(runs, tmp_path) -> Iterator[Callable[..., Owned]]:
    """See `owners`."""
    with owners(runs, tmp_path) as start:
        yield start


@pytest.fixture
def client() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process that connects to an export, and goes on, or stops half way."""
    started: list[subprocess.Popen[str]] = []

    def start(address: Address, *, half: bool = False) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, address.socket, address.export, address.admission, "half" if half else ""],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == ("half open\n" if half else "reading\n")
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def address_of(vm, owned: Owned) -> Address:
    """Where the run's job serves the first disk."""
    server = ElementTree.fromstring(vm.domain.backupGetXMLDesc()).find("server")
    return Address(server.get("socket"), "vda", admission=str(owned.folder / core.SOCKET))


def goes_on(vm, wait_for) -> None:
    wait_for(lambda: vm.job() == 0 and vm.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING, "the guest is free", LIMIT)
    assert vm.monitor("query-status")["running"]


def put_right(vm, runs, owned: Owned) -> None:
    """What the next run does of it."""
    with runs.context(owned.run) as ctx:
        runs.hypervisor.postbackup(owned.run, Outcome(state=RunState.FAILED), ctx)
    assert list(runs.hypervisor.scratch.iterdir()) == []
    vm.untouched()


@pytest.mark.parametrize("action", ["os._exit(7)", "os.kill(os.getpid(), 9)", "os.closerange(3, 4096)"])
def test_whatever_ends_its_owner_the_guest_goes_on(action, small, runs, owner, wait_for):
    small.io("vda", "write -P 0x11 0 1M")
    owned = owner(small, f"{READ}; {action}")
    guard = owned.guard
    assert small.job() != 0
    owned.go()
    goes_on(small, wait_for)
    if "closerange" in action:
        # It lives, and could still come to the record.
        with pytest.raises(HypervisorError, match="has lost the process that guards its guest"):
            verdict.claim(owned.folder)
        owned.process.kill()
    else:
        assert verdict.given_up(owned.folder) is None, "what a dead run has stored may yet be adopted"
    wait_for(lambda: not lives(guard), "the guard ends")
    put_right(small, runs, owned)


def test_an_owner_that_is_stopped_does_not_keep_the_guest(lab, runs, owner, tmpfs, wait_for, tmp_path):
    """It holds a connection by itself, so it has to go."""
    scratch = tmpfs(8)
    boot = tmp_path / "boot.raw"
    boot.write_bytes(boot_sector(60_000).ljust(32 * MiB, b"\x11"))
    vm = lab.vm(["qcow2:32"], content=boot)
    wait_for(lambda: int(vm.domain.blockStats("vda")[2]) > 50, "the guest writes", 30)
    runs.hypervisor = Libvirt(runs.hypervisor.uri, scratch)
    owned = owner(vm, f"{READ}; os.kill(os.getpid(), 19)")
    owned.go()
    wait_for(lambda: verdict.given_up(owned.folder) is not None, "scratch fills", 30)
    goes_on(vm, wait_for)
    assert isinstance(verdict.given_up(owned.folder), TargetFull)
    before = int(vm.domain.blockStats("vda")[2])
    wait_for(lambda: int(vm.domain.blockStats("vda")[2]) > before, "the guest writes on")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_guard_that_is_lost_fails_the_run_and_the_guest_goes_on(number, small, runs, wait_for):
    small.io("vda", "write -P 0x11 0 1M")
    run = runs.run(small)
    with runs.context(run) as ctx:
        prepared = runs.hypervisor.prebackup(run, ctx)
        prepared.artifacts[0].read_at(0, 1)  # a connection that stays open
        os.kill(Guard.of(run.id).process, number)
        goes_on(small, wait_for)  # nobody but the thread that hears the guard does anything here
        wait_for(lambda: ctx.cancelled, "the run is stopped")
        with pytest.raises(HypervisorError, match="the process that guards the guest .* has ended"):
            ctx.check()
        with pytest.raises(HypervisorError, match="has ended"):
            verdict.claim(ctx.folder)
        runs.hypervisor.postbackup(run, Outcome(state=RunState.FAILED), ctx)
    small.untouched()


def test_anybody_may_ask_for_the_run_to_be_given_up(small, runs, owner, client, wait_for):
    owned = owner(small, READ)
    owned.go()
    address = address_of(small, owned)
    reader = client(address)
    found = core.status(owned.folder)
    assert (found.vm, found.name, found.run, found.owner) == (small.uuid, small.name, owned.run.id, owned.process.pid)
    assert (found.phase, found.given_up) == ("watching", None)
    done = core.give_up(owned.folder, Cancelled("cancelled by 'vmkeep cancel'"), LIMIT)
    assert done.released, done
    assert "ended a backup job" in done.did
    assert done.seconds < LIMIT
    goes_on(small, wait_for)
    assert reader.wait(1) == -signal.SIGKILL
    found = core.status(owned.folder)
    assert found.phase == "released"
    assert found.given_up.message == "cancelled by 'vmkeep cancel'"
    assert core.give_up(owned.folder, Cancelled("again"), LIMIT).released
    with pytest.raises(Cancelled, match="by 'vmkeep cancel'"):
        verdict.claim(owned.folder)
    with pytest.raises(ConnectionLost, match="the run was given up: cancelled by"):
        Client(address)
    assert lives(owned.process.pid), "it is told, and nothing is done to it"
    owned.process.kill()
    owned.process.wait()
    with pytest.raises(NotFound, match="no process guards"):
        wait_for(lambda: core.status(owned.folder) is None, "the guard ends")
    put_right(small, runs, owned)


def test_what_the_control_socket_does_not_understand(small, runs):
    run = runs.run(small)
    with runs.context(run) as ctx:
        runs.hypervisor.prebackup(run, ctx)
        for question in (b"\n", b"[]\n", b'{"do": "destroy"}\n', b'{"do": 7}\n', b"{\n", b"[" * 60_000 + b"\n"):
            with connect_to(ctx.folder / core.SOCKET, LIMIT) as connection:
                connection.sendall(question)
                assert "error" in json.loads(connection.recv(1000))
        refused = pytest.raises(OSError, match=r"Broken pipe|reset")
        with connect_to(ctx.folder / core.SOCKET, LIMIT) as connection, refused:
            while True:
                connection.sendall(b"x" * 4096)
        assert stat.S_IMODE((ctx.folder / core.SOCKET).stat().st_mode) == 0o600
        assert core.status(ctx.folder).phase == "watching"
        runs.hypervisor.postbackup(run, Outcome(state=RunState.FAILED), ctx)


def test_an_owner_that_is_stopped_at_its_release_loses_it_once_somebody_asks(small, runs, owner, wait_for):
    action = """
from backupcore_libvirt.release.guard import Guard
with Guard.of(run.id).turn():
    os.kill(os.getpid(), 19)
"""
    owned = owner(small, action)
    owned.go()
    wait_for(lambda: core.status(owned.folder).phase == "the owner releases", "the owner is at it", LIMIT)
    assert core.give_up(owned.folder, Cancelled("cancelled"), LIMIT).released
    goes_on(small, wait_for)
    assert owned.process.wait(1) == -signal.SIGKILL
    put_right(small, runs, owned)


def test_a_client_between_connect_and_go_is_ended_before_the_job(small, runs, owner, client, wait_for):
    """QEMU's main loop would hang for ever, guest and all."""
    owned = owner(small)
    address = address_of(small, owned)
    half = client(address, half=True)
    os.kill(half.pid, signal.SIGSTOP)
    assert connected(Path(address.socket)) == 1
    owned.process.kill()
    goes_on(small, wait_for)
    assert half.wait(1) == -signal.SIGKILL
    put_right(small, runs, owned)


def test_a_stranger_who_is_connected_keeps_the_job_and_is_told(small, runs, owner, wait_for):
    owned = owner(small)
    address = address_of(small, owned)
    with Client(replace(address, admission="")):
        told = core.give_up(owned.folder, Cancelled("cancelled"), 30)
        assert not told.released
        assert "1 connection(s)" in told.why
        assert small.job() != 0
        assert small.monitor("query-status")["running"]
    goes_on(small, wait_for)
    owned.process.kill()
    put_right(small, runs, owned)


def test_a_run_that_was_claimed_is_released_and_stays_a_backup(small, runs, owner, wait_for):
    owned = owner(small)
    verdict.claim(owned.folder)
    assert core.give_up(owned.folder, Cancelled("too late"), LIMIT).released
    goes_on(small, wait_for)
    assert verdict.given_up(owned.folder) is None
    owned.process.kill()
    put_right(small, runs, owned)


def test_a_state_folder_that_is_full_does_not_keep_the_guest(lab, small, runs, owner, tmpfs, wait_for):
    owned = owner(small)
    (owned.folder / f"{verdict.FILE}.x").write_text("")
    owned.folder.chmod(0o500)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=1,ro", "full", str(owned.folder)], check=True)
    try:
        with suppress(NotFound):  # its socket is hidden
            core.give_up(owned.folder, Cancelled("cancelled"), LIMIT)
        owned.process.kill()
        goes_on(small, wait_for)
    finally:
        subprocess.run(["umount", str(owned.folder)], check=True)
    put_right(small, runs, owned)


@pytest.mark.parametrize("cause", ["given up", "its owner dies"])
def test_a_guard_that_gets_no_thread_any_more_lets_the_guest_go(small, runs, owner, wait_for, cause):
    """Its memory is used up, or the number of processes that its container may have."""
    owned = owner(small)
    used = int(Path(f"/proc/{owned.guard}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(owned.guard, resource.RLIMIT_AS, (used + 4 * MiB, used + 4 * MiB))  # a thread's stack has 8
    if cause == "given up":
        assert core.give_up(owned.folder, Cancelled("enough"), LIMIT).released
        assert isinstance(verdict.given_up(owned.folder), Cancelled)
    else:
        owned.process.kill()
    goes_on(small, wait_for)
    put_right(small, runs, owned)


def test_a_vm_that_is_off_can_start_though_its_owner_hangs(lab, runs, owner):
    vm = lab.vm(start=False)
    owned = owner(vm, f"{READ}; os.kill(os.getpid(), 19)")
    owned.go()
    with pytest.raises(libvirt.libvirtError, match="lock"):
        vm.start()
    done = core.give_up(owned.folder, Cancelled("cancelled"), LIMIT)
    assert done.released, done
    assert "ended the servers of its disks" in done.did
    vm.start()


def test_the_run_is_released_though_libvirtd_was_away_when_its_owner_died(daemon, private, wait_for, tmp_path):
    vm, runs = private
    name = vm.name
    with owners(runs, tmp_path) as owner:
        owned = owner(vm)
        daemon.kill()
        owned.process.kill()
        owned.process.wait()
        daemon.start()
        vm.connection = libvirt.open(daemon.uri)
        vm.domain = vm.connection.lookupByName(name)
        goes_on(vm, wait_for)


def test_a_run_that_becomes_a_full_is_guarded_anew_and_not_given_up(small, runs):
    """`release` after an increment that is impossible must not spoil the full that follows in the same context."""
    run = runs.run(small)
    with runs.context(run) as ctx:
        for _ in range(2):
            runs.hypervisor.prebackup(run, ctx)
            first = Guard.of(run.id)
            ctx.release()
            assert small.job() == 0, "released at once"
            runs.hypervisor.postbackup(run, Outcome(state=RunState.FAILED, error=IncrementImpossible("x")), ctx)
            assert Guard.of(run.id) is None
            assert not lives(first.process)
        verdict.claim(ctx.folder)
    small.untouched()


def test_a_cancel_frees_the_guest_though_the_main_thread_does_not_move(small, runs, wait_for):
    run = runs.run(small)
    with runs.context(run) as ctx:
        prepared = runs.hypervisor.prebackup(run, ctx)
        prepared.artifacts[0].read_at(0, 1)
        threading.Thread(target=ctx.cancel).start()
        goes_on(small, wait_for)
        with pytest.raises(Cancelled):
            verdict.claim(ctx.folder)
        runs.hypervisor.postbackup(run, Outcome(state=RunState.CANCELLED), ctx)
    small.untouched()


def test_a_refused_run_leaves_no_process_and_no_verdict(lab, runs, wait_for):
    vm = lab.vm(["qcow2v2:8"])
    run = runs.run(vm)
    with runs.context(run) as ctx:
        with pytest.raises(Exception, match="compat"):
            runs.hypervisor.prebackup(run, ctx)
        guard = Guard.of(run.id)
        assert guard is not None
        runs.hypervisor.postbackup(run, Outcome(state=RunState.FAILED), ctx)
        wait_for(lambda: not lives(guard.process), "it ends")
        assert verdict.given_up(ctx.folder) is None


def test_it_cannot_be_started_where_libvirt_does_not_answer(small, runs, tmp_path):
    run = runs.run(small)
    away = f"qemu+unix:///system?socket={tmp_path}/none"
    with runs.context(run) as ctx:
        guard = Guard(away, small.uuid, small.name, RunFolder(runs.hypervisor.scratch, run.id), ctx)
        with pytest.raises(HypervisorError, match="guards the guest of VM .* could not be started: connect to"):
            guard.require_ready()


def test_a_look_that_breaks_is_a_reason_to_give_the_run_up(tmp_path):
    """Whatever broke it: nobody would look at the guest any more."""

    class Broken(Watch):
        def _look(self):
            raise MemoryError("no room for a thought")

    told = []
    Broken(
        GuardedRun("test:///default", "", "web1", RunFolder(tmp_path, "0" * 32), tmp_path, 0), told.append, print
    ).run()
    (error,) = told
    assert isinstance(error, HypervisorError)
    assert error.message == "VM web1 cannot be watched any more: MemoryError: no room for a thought"


def test_it_says_so_where_its_socket_finds_no_room(small, runs, tmp_path, needs_root):
    run = runs.run(small)
    full = tmp_path / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=1", "lab", full], check=True)
    try:
        with Context(full) as ctx:
            guard = Guard(runs.hypervisor.uri, small.uuid, small.name, RunFolder(runs.hypervisor.scratch, run.id), ctx)
            with pytest.raises(TargetFull, match=f"{full}.*No space left"):
                guard.require_ready()
    finally:
        subprocess.run(["umount", full], check=True)


def test_it_outlives_what_ends_its_owner_and_is_no_victim_of_the_oom_killer(small, runs):
    run = runs.run(small)
    with runs.context(run) as ctx:
        runs.hypervisor.prebackup(run, ctx)
        process = Guard.of(run.id).process
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            os.kill(process, number)
        assert os.getsid(process) == process, "a session of its own"
        score = "echo -1000 >/proc/self/oom_score_adj 2>/dev/null; cat /proc/self/oom_score_adj"
        least = subprocess.run(["sh", "-c", score], capture_output=True, text=True, check=True).stdout
        assert Path(f"/proc/{process}/oom_score_adj").read_text() == least, "as low as this user may have it"
        assert core.status(ctx.folder).phase == "watching"
        runs.hypervisor.postbackup(run, Outcome(state=RunState.FAILED), ctx)
        assert not lives(process)


def serve(control: socket.socket) -> None:
    """What the guard's first child runs in the next test."""
    descriptors = list(Path("/proc/self/fd").iterdir())
    score = Path("/proc/self/oom_score_adj").read_text().strip()
    control.sendall(json.dumps([os.getppid(), len(descriptors), score, "libvirt" in sys.modules]).encode())
    control.recv(1)


def test_it_forks_who_reads_before_anything_else(small, runs, wait_for):
    run = runs.run(small)
    ours, theirs = socket.socketpair()
    with runs.context(run) as ctx, ours:
        folder = RunFolder(runs.hypervisor.scratch, run.id)
        name = "drivers.libvirt.tests.test_guard:serve"
        guard = Guard(runs.hypervisor.uri, small.uuid, small.name, folder, ctx, serve=(name, ours, theirs))
        guard.hold()
        parent, descriptors, score, _ = json.loads(ours.recv(1000))
        assert parent == guard.process
        assert descriptors <= 5, "0, 1, 2, the socket, and the one that lists them"
        assert score == Path("/proc/self/oom_score_adj").read_text().strip()
        assert lives(guard.reader)
        os.kill(guard.reader, signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{guard.reader}").exists(), "it is reaped")
        with guard.turn():
            pass


BUSCTL = """#!/bin/sh
echo "$@" > {folder}/asked
{then}
"""


@pytest.mark.parametrize(
    ("then", "problem"),
    [("echo Access denied >&2; exit 1", "Access denied"), ("exit 3", "exit code 3"), ("exit 0", "has not started")],
)
def test_a_unit_of_its_own_is_asked_for_where_systemd_runs(then, problem, tmp_path, monkeypatch):
    program = tmp_path / "busctl"
    program.write_text(BUSCTL.format(folder=tmp_path, then=then))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert OwnUnit("0" * 32, tmp_path / "none").wait() == "", "no systemd"
    assert problem in OwnUnit("0" * 32, tmp_path).wait()
    asked = (tmp_path / "asked").read_text()
    assert f"backupcore-guard-{'0' * 32}.scope" in asked
    assert f"PIDs au 1 {os.getpid()} " in asked
    assert "CollectMode s inactive-or-failed" in asked
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "busctl" in OwnUnit("0" * 32, tmp_path).wait()


def test_two_never_end_a_job_at_once(runs, small, wait_for):
    folder = RunFolder(runs.hypervisor.scratch, "0" * 32)
    os.close(folder.make(Owner(os.geteuid(), os.getegid()), small.uuid))
    order: list[str] = []

    def second() -> None:
        with folder.sole(LIMIT):
            order.append("second")

    with folder.sole(LIMIT) as there:
        assert there
        thread = threading.Thread(target=second)
        thread.start()
        with pytest.raises(HypervisorError, match="at the release"), folder.sole(0.05):
            pass
        order.append("first")
    thread.join(LIMIT)
    assert order == ["first", "second"]
    folder.remove()
    with folder.sole(LIMIT) as there:
        assert not there


def test_how_long_the_guard_takes_to_be_ready(small, runs, caplog):
    """It is started early in prebackup, so that nobody waits for it."""
    caplog.set_level(logging.WARNING)
    run = runs.run(small)
    with runs.context(run) as ctx:
        started = time.monotonic()
        guard = Guard(runs.hypervisor.uri, small.uuid, small.name, RunFolder(runs.hypervisor.scratch, run.id), ctx)
        begun = time.monotonic() - started
        guard.require_ready()
        ready = time.monotonic() - started
        ticks = sum(map(int, Path(f"/proc/{guard.process}/stat").read_text().rpartition(")")[2].split()[11:13]))
    logging.getLogger("backupcore").info(
        "begun in %.3f s, ready in %.3f s, %d ms of processor time", begun, ready, ticks * 10
    )
    assert begun < 1
    assert not caplog.text
