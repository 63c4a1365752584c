"""Other processes as /proc shows them: real ones, hung by a real file system."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from backupcore import process
from lab.blocking_fs import Blocking, blocking
from lab.host import wait_until

WRITER = """
import fcntl, os, sys, threading
lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(lock, fcntl.LOCK_EX)
def write():
    os.write(os.open(sys.argv[2], os.O_RDWR | os.O_CREAT), b"x" * 100000)
if len(sys.argv) > 3:
    write()
thread = threading.Thread(target=write)
thread.start()
thread.join()
"""

CANNOT_END = "was killed and cannot end: it waits in write of "


@contextmanager
def writer(place: Path, target: Path, *more: str):
    """A process that holds place/lock and writes to target/file."""
    command = [sys.executable, "-c", WRITER, str(place / "lock"), str(target / "file"), *more]
    child = subprocess.Popen(command)
    try:
        yield child
    finally:
        child.kill()


@contextmanager
def writer_held_up(place: Path, target: Blocking, *more: str):
    """The same, to a target that does not answer."""
    target.block("write")
    with writer(place, target.path, *more) as child:
        yield child


def lock_of(place: Path) -> int:
    return os.open(place / "lock", os.O_RDWR)


def test_a_living_process_that_hangs_is_not_dying_and_says_where(tmp_path: Path):
    with blocking(tmp_path) as target:
        target.block("write")
        with writer(tmp_path, target.path) as child:
            wait_until(lambda: process.hang(child.pid), "the write")
            hung = process.hang(child.pid)
            assert hung is not None
            assert str(hung) == f"process {child.pid} ({hung.name}) waits in write of {target.path}/file"
            lock = lock_of(tmp_path)
            assert process.holders(lock) == {child.pid}
            assert not process.dying(child.pid)
            assert not process.held_by_the_dying(lock)
            os.close(lock)
            target.unblock()
            assert child.wait(60) == 0


def test_one_that_was_killed_in_its_write_is_dying_whichever_thread_writes(tmp_path: Path):
    for more in ((), ("in the main thread",)):
        place = tmp_path / f"of-{len(more)}"
        place.mkdir()
        with blocking(place) as target, writer_held_up(place, target, *more) as child:
            wait_until(lambda number=child.pid: process.hang(number), "the write")
            child.kill()
            wait_until(lambda number=child.pid: process.dying(number), "the kill")
            assert child.poll() is None
            lock = lock_of(place)
            assert process.held_by_the_dying(lock)
            wait_until(lambda number=child.pid: CANNOT_END in str(process.hang(number)), "where it hangs")
            target.unblock()
            assert child.wait(60) == -signal.SIGKILL
            assert process.holders(lock) == set()
            assert not process.held_by_the_dying(lock), "nobody holds it"
            os.close(lock)


def test_one_that_is_stopped_says_so_and_one_that_waits_for_input_does_not_hang():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert process.hang(child.pid) is None
        child.send_signal(signal.SIGSTOP)
        wait_until(lambda: process.hang(child.pid), "the stop")
        hung = process.hang(child.pid)
        assert hung is not None
        assert hung.stopped
        assert not process.dying(child.pid)
        child.kill()
    assert process.hang(child.pid) is None
    assert not process.dying(child.pid), "it is gone"


def test_children_are_found_through_their_parents():
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        (only,) = process.children(child.pid)
        assert child.pid in process.children(os.getpid())
        assert only in process.children(os.getpid())
        child.communicate(b"\n")


def test_what_no_thread_can_be_had_for_is_done_all_the_same():
    code = """
import resource, threading
from pathlib import Path
from backupcore.thread import aside
aside(lambda: print("aside", threading.current_thread().name), "one").join()
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), used + (4 << 20)))
threading.stack_size(64 << 20)  # none of those that are kept for the next thread
print(aside(lambda: print("here", threading.current_thread().name), "two"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["aside one", "here MainThread", "None"]
