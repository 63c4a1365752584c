"""The processes below ours, as /proc shows them."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

__all__ = ["alive", "below", "call", "commands", "start", "survivors", "wait_for"]

Process = tuple[int, str]
"""A process: its ID, and when it started (IDs are used again)."""

# -I and the parent's own path: the child must not import what lies in the current folder.
_CHILD = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); from backupcore.testing.child import main; main()"
)


def _stat(pid: int) -> tuple[int, str, str] | None:
    """Parent, state and start of a process; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1]), fields[0], fields[19]


def below(root: int | None = None) -> set[Process]:
    """All descendants of `root` (of ours) that run; those that only wait to be reaped do not count."""
    found = {int(path.name): _stat(int(path.name)) for path in Path("/proc").glob("[0-9]*")}
    children: dict[int, list[int]] = {}
    for pid, seen in found.items():
        if seen:
            children.setdefault(seen[0], []).append(pid)
    result: set[Process] = set()
    left = [root or os.getpid()]
    while left:
        for pid in children.get(left.pop(), []):
            left.append(pid)
            seen = found[pid]
            if seen and seen[1] != "Z":
                result.add((pid, seen[2]))
    return result


def survivors(family: set[Process], seconds: float) -> list[int]:
    """Those of `family` that still run after `seconds`. They are killed then: an examination leaves nothing behind."""
    if wait_for(lambda: not any(map(alive, family)), seconds):
        return []
    left = [process[0] for process in family if alive(process)]
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return left


def alive(process: Process) -> bool:
    """Whether exactly this process still runs."""
    seen = _stat(process[0])
    return seen is not None and seen[2] == process[1] and seen[1] != "Z"


def commands() -> dict[int, str]:
    """The command line of every process of this machine, as anybody may read it."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found[int(path.parent.name)] = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> bool:
    """Wait until `condition` holds; False if it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def start(job: str, *arguments: Any, stdout: int | IO[bytes] = subprocess.PIPE) -> subprocess.Popen[bytes]:
    """Do `job` of `backupcore.testing.child` in a process of its own. What cannot be pickled raises here."""
    data = pickle.dumps((job, arguments))
    child = subprocess.Popen(
        [sys.executable, "-I", "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert child.stdin
    try:
        pickle.dump(sys.path, child.stdin)
        child.stdin.write(data)
        child.stdin.close()
    except BrokenPipeError:
        pass  # it has ended; its stderr says why
    child.stdin = None  # communicate would flush it
    return child


def call(job: str, *arguments: Any, seconds: float = 120.0) -> Any:
    """Do `job` in a process of its own and return its answer; RuntimeError with its last words if it fails."""
    with start(job, *arguments) as child:
        try:
            out, err = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            raise RuntimeError(f"the other process was not done after {seconds:.0f} s") from None
    if child.returncode:
        raise RuntimeError("in another process: " + (err.decode(errors="replace").strip().splitlines() or ["?"])[-1])
    return pickle.loads(out)  # noqa: S301 - from our own child, over a pipe
