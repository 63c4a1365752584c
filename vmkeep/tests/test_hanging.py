"""Runs that do not end: in the kernel, stopped, killed, deaf. Each in one clear line, and the next backup works."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from kept_in_files import DB, WEB, load, save

from backupcore import guard, process, verdict
from backupcore.disk.unix_socket import listen_at
from backupcore.errors import TargetFull, load_error
from lab.blocking_fs import blocking
from vmkeep import lock
from vmkeep.catalog import runs
from vmkeep.catalog.database import Catalog

ROOT = Path(__file__).parent.parent.parent
QUICK = 15.0
"""Seconds. `vmkeep cancel` itself takes 8 at most; on a busy machine the start of Python takes some of its own."""


class Guard:
    """What guards a run's guest, in the test's own process: it gives the run up when it is asked to."""

    def __init__(self, site, run):
        self.folder = site.state / "runs" / run
        self.site = site
        self.run = run
        self.server = listen_at(self.folder / guard.SOCKET)
        self.asked = []
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            with connection:
                said = json.loads(connection.makefile().readline())
                self.asked.append(said)
                if said["do"] == "status":
                    phase = "released" if len(self.asked) > 2 else "giving up"
                    connection.sendall(json.dumps({"vm": WEB.uuid, "phase": phase}).encode() + b"\n")
                    continue
                verdict.give_up(self.folder, load_error(said))
                guests = load(self.site.guests)
                for guest in guests:
                    if guest.busy == self.run:
                        guest.busy = ""
                save(self.site.guests, guests)
                connection.sendall(
                    json.dumps({"released": True, "seconds": 0.1, "did": ["ended a backup job"]}).encode() + b"\n"
                )


@pytest.fixture
def hanging(site, tmp_path):
    """A site whose datastore lies on a file system that can hang; its own folder, below it, never does.

    Its driver writes nothing before the guest is held, as one with identities would.
    """
    with blocking(tmp_path) as target:
        site.configure(datastores=f'[datastores.nas]\ndriver = "plain"\npath = "{target.path}"\n')
        site.target = target
        yield site


def in_the_kernel(site):
    """A backup whose process waits in a write that does not return."""
    site.target.block("write")
    child = site.start("backup", "web1")
    site.until(lambda: (hung := process.hang(child.pid)) and "write" in hung.why, "a write that hangs")
    (folder,) = (site.state / "runs").iterdir()
    return child, folder.name


def deaf_backup(site):
    (site.store / "deaf").touch()
    child = site.start("backup", "web1")
    site.until((site.store / "waits").exists, "the backup")
    return child, (site.store / "waits").read_text()


def told_of(child, words):
    """The next line of stderr with these words."""
    line = child.stderr.readline()
    while words not in line:
        assert line, "the command ended without a word"
        line = child.stderr.readline()
    return line


@contextmanager
def quick():
    began = time.monotonic()
    yield
    assert time.monotonic() - began < QUICK


def the_next_backup_works(site):
    told = site.process("backup", "web1")
    assert told.code == 0, told.err
    return told


def test_on_a_network_file_system_the_folders_of_runs_do_not_pile_up(site, tmp_path):
    """A file that is removed while it is open, as a run's lock is, keeps another name there, and the folder with it."""
    with blocking(tmp_path) as target:
        site.state.symlink_to(target.path)
        told = site.process("backup", "web1")
        assert (told.code, "could not be removed" in told.err) == (0, False), told.err
        assert not list((site.state / "runs").iterdir())


def test_cancel_of_an_owner_that_waits_in_the_kernel_frees_the_guest_and_names_what_hangs(hanging):
    child, run = in_the_kernel(hanging)
    guarding = Guard(hanging, run)
    with quick():
        told = hanging.process("cancel", "web1")
    assert told.code == 3
    assert "web1: a backup was stopped (" in told.out
    assert "; the guest is let go of" in told.out
    assert f"not ended: process {child.pid} (" in told.err
    assert f" waits in write of {hanging.target.path}/" in told.err
    assert f"kill -9 {child.pid}; then vmkeep recover web1" in told.err
    assert [one["kind"] for one in guarding.asked] == ["Cancelled"]
    assert not hanging.guest(WEB).busy
    assert child.poll() is None
    hanging.target.unblock()
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130, (out, err)
    assert lock.holder(hanging.state, "web1") is None
    the_next_backup_works(hanging)


def test_cancel_in_json_says_what_has_not_ended(hanging):
    child, run = in_the_kernel(hanging)
    Guard(hanging, run)
    told = hanging.process("cancel", "web1", "--json")
    assert told.code == 3
    document = json.loads(told.out)
    assert (document["ended"], document["state"]) == (False, "cancelled")
    (left,) = document["left"]
    assert (left["process"], left["why"].split(" of ")[0]) == (child.pid, "waits in write")
    assert left["since"]


def test_a_backup_beside_one_that_waits_in_the_kernel_says_where_it_hangs(hanging):
    child, _ = in_the_kernel(hanging)
    with quick():
        told = hanging.process("backup", "web1")
    assert told.code == 10
    assert f"already running (process {child.pid}, since " in told.err
    assert f"it waits in write of {hanging.target.path}/" in told.err


def test_ctrl_c_is_heard_in_a_write_that_does_not_return_and_a_second_one_ends_the_run(hanging):
    child, run = in_the_kernel(hanging)
    child.send_signal(signal.SIGINT)
    line = told_of(child, "does not answer")
    assert f"datastore nas does not answer: process {child.pid} (" in line
    assert f"waits in write of {hanging.target.path}/" in line
    assert "at once with another Ctrl-C" in line
    child.send_signal(signal.SIGINT)
    hanging.until_dying(child.pid)
    last = hanging.run("vm", "show", "web1", "--json").json["last_runs"][0]
    assert (last["state"], last["error"]["class"]) == ("cancelled", "Cancelled")
    # It cannot end, but none of it runs any more: the next one takes its lock.
    assert verdict.given_up(hanging.state / "runs" / run) is not None
    hanging.target.block("nothing")
    told = the_next_backup_works(hanging)
    assert "the lock of a dead run is taken over" in told.err
    hanging.target.unblock()
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "What datastore nas still holds of this run is swept by the next backup of web1 to it" in err


def test_kill_9_of_a_run_that_waits_in_the_kernel_leaves_no_lock_and_no_guest(hanging):
    child, run = in_the_kernel(hanging)
    child.kill()
    hanging.until_dying(child.pid)
    assert child.poll() is None, "the kernel keeps it"
    assert lock.holder(hanging.state, "web1").dying
    hanging.target.block("nothing")
    with quick():
        told = hanging.process("cancel", "web1")
    assert told.code == 3, told.err
    assert f"let go of the guest, held by run {run}" in told.out
    assert f"process {child.pid} (" in told.err
    assert "was killed and cannot end: it waits in write of " in told.err
    assert not hanging.guest(WEB).busy
    the_next_backup_works(hanging)
    assert process.dying(child.pid), "still in its write"


def without_locks(site, *arguments):
    mount = 'mount -t proc -o subset=pid lab /proc; exec "$0" -m vmkeep "$@"'
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount, sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": site.paths, "VMKEEP_CONFIG": str(site.config)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_cancel_returns_though_the_state_folder_does_not_answer(hanging):
    hanging.process("backup", "web1")
    locks = hanging.state / "locks"
    there = hanging.target.path / "locks"
    shutil.copytree(locks, there)
    shutil.rmtree(locks)
    locks.symlink_to(there)
    hanging.target.block("getattr", "readdir", "open", "read")
    with quick():
        told = hanging.process("cancel", "web1")
    assert told.code == 5, told.err
    assert f"the state folder {hanging.state} does not answer" in told.err
    assert "SIGTERM" in told.err
    hanging.target.unblock()
    assert hanging.process("cancel", "web1").code == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_cancel_where_the_holder_of_a_lock_cannot_be_told(hanging):
    """The guard lets the guest go. The process, which lives, does not count as ended."""
    child, run = in_the_kernel(hanging)
    Guard(hanging, run)
    told = without_locks(hanging, "cancel", "web1")
    assert told.returncode == 3, told.stderr
    assert f"process {child.pid} was not told" in told.stdout
    assert f"not ended: process {child.pid} (" in told.stderr
    assert not hanging.guest(WEB).busy
    child.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_lock_whose_holder_cannot_be_told_is_not_taken_over(hanging):
    """As in a unit with ProcSubset=pid: /proc/locks is not there, and nothing of /proc but the processes."""
    child, _ = in_the_kernel(hanging)
    child.kill()
    hanging.until_dying(child.pid)
    hanging.target.block("nothing")
    told = without_locks(hanging, "backup", "web1")
    assert told.returncode == 10, told.stderr
    assert f"the lock of VM web1 is held by a dead run: process {child.pid} (" in told.stderr
    assert "without ProcSubset=pid" in told.stderr
    the_next_backup_works(hanging)


def test_recover_of_a_killed_run_that_cannot_end(hanging):
    child, run = in_the_kernel(hanging)
    child.kill()
    hanging.until_dying(child.pid)
    hanging.target.block("nothing")
    told = hanging.process("recover", "web1")
    assert told.code == 0, told.err
    assert f"let go of the guest, held by run {run}" in told.out
    assert not list((hanging.state / "runs").iterdir())
    assert process.dying(child.pid)


def test_cancel_returns_though_the_recovery_of_a_killed_run_hangs_too(hanging):
    child, _ = in_the_kernel(hanging)
    child.kill()
    hanging.until_dying(child.pid)
    hanging.target.block("write", "getattr", "readdir", "open", "create", "statfs")
    with quick():
        told = hanging.process("cancel", "web1")
    assert told.code == 3
    assert "(vmkeep recover)" in told.err


def test_a_driver_that_is_deaf_to_a_cancel_is_left_behind_by_a_second_ctrl_c(site):
    child, run = deaf_backup(site)
    child.send_signal(signal.SIGINT)
    told_of(child, "at once with another Ctrl-C")
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "vmkeep: cancelled; web1 is being let go of" in err
    assert lock.holder(site.state, "web1") is None
    (site.store / "deaf").unlink()
    assert f"let go of the guest, held by run {run}" in the_next_backup_works(site).err


def test_cancel_of_a_deaf_driver_with_a_guard_frees_the_guest_in_time(site):
    child, run = deaf_backup(site)
    Guard(site, run)
    with quick():
        told = site.process("cancel", "web1")
    assert told.code == 3
    assert f"not ended: process {child.pid} (vmkeep), at work since " in told.err
    assert "was told to stop and still tidies up (a backup)" in told.err
    assert not site.guest(WEB).busy
    (site.store / "deaf").unlink()
    assert child.wait(60) == 130
    assert not [path for path in site.store.glob("[!.]*") if path.is_dir()], "given up, and stored too late: withdrawn"
    the_next_backup_works(site)


def test_cancel_of_a_deaf_driver_without_a_guard_is_busy_within_ten_seconds(site):
    child, _ = deaf_backup(site)
    with quick():
        told = site.process("cancel", "web1")
    assert told.code == 10
    assert f"process {child.pid} (a backup of VM web1) was told to stop and has not let go of the VM" in told.err
    assert f"kill -9 {child.pid}, then vmkeep recover web1" in told.err


def test_cancel_wakes_up_an_owner_that_was_stopped_and_says_so(site):
    (site.store / "wait").touch()
    child = site.start("backup", "web1")
    site.until((site.store / "waits").exists, "the backup")
    child.send_signal(signal.SIGSTOP)
    site.until(lambda: process.hang(child.pid), "the stop")
    busy = site.process("backup", "web1")
    assert busy.code == 10
    assert "it is stopped (SIGSTOP or Ctrl-Z)" in busy.err
    assert f"kill -CONT {child.pid}" in busy.err
    with quick():
        told = site.process("cancel", "web1")
    assert told.code == 0
    assert f"process {child.pid} is stopped (SIGSTOP or Ctrl-Z); it was woken up to end" in told.out
    assert child.wait(60) == 130
    assert not site.guest(WEB).busy
    (site.store / "wait").unlink()
    the_next_backup_works(site)


@pytest.mark.parametrize("status", ["0", "7"])
def test_a_driver_that_ends_the_process_leaves_what_the_next_backup_puts_right(site, status):
    (site.store / "exit").write_text(status)
    told = site.process("backup", "web1", "-q")
    assert (told.code, told.err.count("\n")) == (1, 2), told.err
    assert f", has ended vmkeep (os._exit({status})) before the command had come to its end" in told.err
    assert site.guest(WEB).busy
    (site.store / "exit").unlink()
    told = site.process("cancel", "web1")
    assert told.code == 4
    assert "vmkeep recover" in told.err
    assert "let go of the guest" in the_next_backup_works(site).err


def test_a_driver_that_closes_every_file_is_named_and_nothing_is_recorded(site):
    (site.store / "close-all").touch()
    told = site.process("backup", "web1")
    assert told.code != 0
    assert "Traceback" not in told.err, told.err
    assert "the lock of VM web1 was lost while it was backed up: a plugin closes files" in told.err
    assert lock.holder(site.state, "web1") is None
    (site.store / "close-all").unlink()
    # Whoever goes on writing to a number that was closed under him must not find the catalog open under it.
    (run,) = runs.last(Catalog.open(site.state / "catalog.sqlite"), WEB.uuid, 1)
    assert run.state == "running"
    the_next_backup_works(site)


def test_a_process_that_a_driver_has_forked_does_not_keep_the_locks_of_a_run_that_was_killed(site):
    (site.store / "fork").touch()
    told = site.process("backup", "web1")
    assert told.code == -9
    child = int((site.store / "forked").read_text())
    try:
        (site.store / "fork").unlink()
        assert lock.holder(site.state, "web1") is None
        the_next_backup_works(site)
        assert not process.dying(child)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_child_that_comes_back_from_a_driver_does_not_go_on_with_the_run(site):
    (site.store / "fork-and-return").touch()
    told = site.process("backup", "web1")
    assert told.code == 0, told.err
    assert told.out.count("FULL backup") == 1
    (site.store / "fork-and-return").unlink()
    assert site.run("backup", "web1", "--json").json["type"] == "INCREMENT"


TAKE = """
import sys
from pathlib import Path
from backupcore.errors import Busy
from backupcore.model import VM
from vmkeep import lock
try:
    with lock.vm_run(Path(sys.argv[1]), VM(uuid=sys.argv[2], name="db1")):
        print("got", flush=True)
        sys.stdin.readline()
except Busy:
    print("busy", flush=True)
"""

HANG = """
import os, sys, threading
from pathlib import Path
from backupcore.model import VM
from vmkeep import lock
def write():
    handle = os.open(sys.argv[3], os.O_RDWR | os.O_CREAT)
    os.write(handle, b"x" * 100000)
with lock.vm_run(Path(sys.argv[1]), VM(uuid=sys.argv[2], name="db1")):
    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
"""


def test_of_many_that_want_the_lock_of_a_dying_process_one_gets_it(hanging, tmp_path, installed):
    hanging.target.block("write")
    environment = {**os.environ, "PYTHONPATH": installed}
    place = [str(tmp_path / "locks-of"), DB.uuid]
    dead = subprocess.Popen([sys.executable, "-c", HANG, *place, str(hanging.target.path / "x")], env=environment)
    hanging.children.append(dead)
    hanging.until(lambda: process.hang(dead.pid), "the write")
    dead.kill()
    hanging.until_dying(dead.pid)
    for _ in range(3):
        takers = [
            subprocess.Popen(
                [sys.executable, "-c", TAKE, *place],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(4)
        ]
        said = sorted(taker.stdout.readline().strip() for taker in takers)
        assert said == ["busy", "busy", "busy", "got"]
        for taker in takers:
            taker.communicate("\n", timeout=60)
    hanging.target.unblock()
    dead.wait(60)


def test_what_a_run_that_was_given_up_had_stored_is_never_recorded_and_is_removed(site):
    (site.store / "die").touch()  # after it was published
    assert site.process("backup", "web1").code == -9
    (site.store / "die").unlink()
    (folder,) = (site.state / "runs").iterdir()
    (source,) = [path.name for path in site.store.glob("[!.]*") if path.is_dir()]
    assert verdict.give_up(folder, TargetFull("scratch is full"))
    told = site.process("recover", "web1")
    assert told.code == 0, told.err
    assert (
        f"run {folder.name[:8]} was given up (scratch is full): removed source {source[:8]}" in told.out
    ) or f"removed source {source}" in told.out
    assert not [path.name for path in site.store.glob("[!.]*") if path.is_dir()]
    assert site.run("image", "list", "--json").json == []


def test_what_a_run_that_was_given_up_had_stored_is_named_where_it_cannot_be_removed(site):
    (site.store / "die").touch()
    assert site.process("backup", "web1").code == -9
    (site.store / "die").unlink()
    (folder,) = (site.state / "runs").iterdir()
    assert verdict.give_up(folder, TargetFull("scratch is full"))
    (site.store / "fail-delete").touch()
    told = site.process("recover", "web1")
    assert "is not recorded and stays in datastore nas, unused (" in told.out
    assert site.run("image", "list", "--json").json == []


def test_a_run_that_was_claimed_and_killed_before_the_record_is_recorded_by_the_next(site):
    (site.store / "die").touch()
    assert site.process("backup", "web1").code == -9
    (site.store / "die").unlink()
    (folder,) = (site.state / "runs").iterdir()
    verdict.claim(folder)
    assert site.process("recover", "web1").code == 0
    assert len(site.run("image", "list", "--json").json) == 1


def test_recover_waits_until_the_guard_of_a_dead_run_has_let_the_guest_go(hanging):
    child, run = in_the_kernel(hanging)
    guarding = Guard(hanging, run)
    child.kill()
    hanging.until_dying(child.pid)
    hanging.target.block("nothing")
    told = hanging.process("recover", "web1")
    assert told.code == 0, told.err
    assert [one["do"] for one in guarding.asked] == ["status"] * 3, "and nothing is marked"


IMPATIENT = """
from vmkeep import attended
from vmkeep.cli import main
attended.LIMIT = 5.0
main.main()
"""


def test_a_run_that_was_given_up_and_hangs_ends_by_itself_with_the_reason(site):
    site.configure(extra='plugins = ["kept_in_files:Watch"]')
    (site.store / "deaf").touch()
    child = subprocess.Popen(
        [sys.executable, "-c", IMPATIENT, "backup", "web1"],
        env={**os.environ, "PYTHONPATH": site.paths, "VMKEEP_CONFIG": str(site.config)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    site.children.append(child)
    site.until((site.store / "waits").exists, "the backup")
    (site.folder / "full").touch()
    _, err = child.communicate(timeout=60)
    assert child.returncode == 6, err
    assert "vmkeep: scratch is full; " in err
    assert "Make room there." in err
    last = site.run("vm", "show", "web1", "--json").json["last_runs"][0]
    assert (last["state"], last["error"]["class"]) == ("failed", "TargetFull")
    (site.store / "deaf").unlink()
    (site.folder / "full").unlink()
    the_next_backup_works(site)


def test_ctrl_c_at_any_moment_of_the_begin_leaves_no_run_that_seems_to_run(site, tmp_path):
    """Before there is a context, too: at the record of the begin, the folder, the first look at the hypervisor."""
    for step in (
        "vmkeep.catalog.runs:begin call",
        "vmkeep.catalog.runs:begin return",
        "vmkeep.folders:own return",
        "vmkeep.recovery:put_right call",
        "vmkeep.interrupt:Stop.reaches call",
    ):
        child = subprocess.Popen(
            [sys.executable, "-m", "lab.kill_at", step, "vmkeep", "backup", "web1"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": site.paths, "VMKEEP_CONFIG": str(site.config), "LAB_AT": "interrupt"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        site.children.append(child)
        _, err = child.communicate(timeout=60)
        assert child.returncode == 130, (step, err)
        assert "vmkeep: cancelled" in err
        states = {run["state"] for run in site.run("vm", "show", "web1", "--json").json["last_runs"]}
        assert states <= {"cancelled"}, step
        assert not site.guest(WEB).busy
        assert not list((site.state / "runs").glob("*"))


def test_a_clean_up_at_the_datastore_that_fails_is_told_in_one_line(site):
    (site.store / "wait").touch()
    (site.store / "owes").touch()
    child = site.start("backup", "web1")
    site.until((site.store / "waits").exists, "the backup")
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    lines = [line for line in err.splitlines() if "had begun to store" in line]
    assert len(lines) == 1, err
    assert "datastore nas: what run " in lines[0]
    assert "stays there until the next backup of web1 to it sweeps it (" in lines[0]
