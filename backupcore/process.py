"""Other processes of this host, as Linux shows them in ``/proc``: which are dying, where they hang, who holds a lock.

A thread that waits in the kernel for a file system that does not answer (state D, or asleep within a write) hears no
signal. After a SIGKILL the rest of its process is a zombie, and the files, sockets and flocks of the process stay until
that thread wakes up; it then ends without running any more of the program.

Formats: proc(5), and the kernel's Documentation/filesystems/proc.rst.
"""

from __future__ import annotations

import os
import platform
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Hang", "children", "dying", "hang", "hangs", "held_by_the_dying", "holders", "locks_are_shown", "stopped"]

_PROC = Path("/proc")
_EXITING = 0x4  # PF_EXITING of the flags in /proc/PID/stat
_LOOK_AGAIN = 0.2  # seconds; a write that goes on waits in the kernel too, and then in another call

# Calls that wait for a file system, by their numbers on x86-64; of others only the kernel's function is told.
_CALLS = {
    0: "read", 1: "write", 2: "open", 3: "close", 4: "stat", 5: "fstat", 6: "lstat", 17: "pread", 18: "pwrite",
    19: "readv", 20: "writev", 40: "sendfile", 74: "fsync", 75: "fdatasync", 76: "truncate", 77: "ftruncate",
    78: "getdents", 82: "rename", 83: "mkdir", 84: "rmdir", 86: "link", 87: "unlink", 89: "readlink", 90: "chmod",
    91: "fchmod", 92: "chown", 137: "statfs", 138: "fstatfs", 162: "sync", 166: "umount", 187: "readahead",
    217: "getdents", 221: "fadvise", 257: "openat", 258: "mkdirat", 262: "stat", 263: "unlinkat", 264: "renameat",
    265: "linkat", 267: "readlinkat", 277: "sync_file_range", 280: "utimensat", 285: "fallocate", 295: "preadv",
    296: "pwritev", 306: "syncfs", 316: "renameat2", 326: "copy_file_range", 332: "statx",
}  # fmt: skip
# Of these the first argument is a file descriptor, which tells the path; the others wait on sockets and pipes as well.
_OF_FILES = {0, 1, 3, 5, 17, 18, 19, 20, 40, 74, 75, 77, 78, 91, 138, 217, 221, 277, 285, 295, 296, 306, 326}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hang:
    """A process that does not go on: why, in words that follow "process 123 (restic)"."""

    process: int
    name: str
    why: str
    stopped: bool = False
    """It was stopped, by SIGSTOP or Ctrl-Z, and does not wait for anything."""

    def __str__(self) -> str:
        return f"process {self.process} ({self.name}) {self.why}"


def dying(process: int) -> bool:
    """Whether a process is there and will run none of its program any more: a zombie, or killed and not yet gone."""
    threads = _threads(process)
    return bool(threads) and all(_thread_dying(thread) for thread in threads)


def stopped(process: int) -> bool:
    """Whether a process was stopped, by SIGSTOP or Ctrl-Z, or is held by a debugger."""
    return _stat(_PROC / str(process))[:1] in (["T"], ["t"])


def holders(handle: int) -> set[int]:
    """The processes that hold flocks on the file of this descriptor, as far as this PID namespace shows them.

    They are those that asked for the lock; a child that has inherited it keeps it after them. Empty where the locks
    are not shown.
    """
    device, inode = _identity(handle)
    found = set()
    for line in _read(_PROC / "locks").splitlines():
        # "1: FLOCK  ADVISORY  WRITE 708 00:13:64393 0 EOF"; with "->" after the number: one that waits for it.
        words = line.split()
        if len(words) > 5 and words[1] == "FLOCK":
            major, minor, number = words[5].split(":")
            if ((int(major, 16), int(minor, 16)), int(number)) == (device, inode):
                found.add(int(words[4]))
    return found


def locks_are_shown() -> bool:
    """Whether ``/proc/locks`` is there: in a unit with ProcSubset=pid it is not, and nobody tells who holds a lock."""
    return os.access(_PROC / "locks", os.R_OK)


def held_by_the_dying(handle: int) -> bool:
    """Whether all that hold a flock on this file are `dying`: nothing of them can change any more what it protects.

    False where that cannot be told.
    """
    found = holders(handle)
    return bool(found) and all(dying(process) for process in found)


def children(process: int) -> list[int]:
    """The processes that it has started and that are still there, and theirs."""
    parents: dict[int, list[int]] = {}
    for place in _PROC.glob("[0-9]*"):
        fields = _stat(place)
        if fields:
            parents.setdefault(int(fields[1]), []).append(int(place.name))
    found = []
    next_ones = [process]
    while next_ones:
        next_ones = [child for one in next_ones for child in parents.get(one, ())]
        found += next_ones
    return found


def hang(process: int) -> Hang | None:
    """How a process hangs, after a second look 0.2 s later; None if it does not, or nobody can tell."""
    return next(iter(hangs([process])), None)


def hangs(processes: Iterable[int]) -> list[Hang]:
    """Those of them that hang; the same two looks for all."""
    before = {process: _hung(process) for process in processes}
    if not any(before.values()):
        return []
    time.sleep(_LOOK_AGAIN)
    found = []
    for process, first in before.items():
        second = _hung(process)
        if first and second and (second[0] == first[0] or second[1].stopped):
            found.append(second[1])
    return found


def _threads(process: int) -> list[Path]:
    try:
        return sorted(_PROC.joinpath(str(process), "task").iterdir(), key=lambda path: int(path.name))
    except OSError:
        return []


def _stat(place: Path) -> list[str]:
    """The fields after the name, from the state on; the name may hold anything. Empty for what is gone."""
    try:
        return (place / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _thread_dying(thread: Path) -> bool:
    fields = _stat(thread)
    # A thread on its way out, which waits for a file system as it closes its files, has no signal pending any more.
    if not fields or fields[0] in "ZX" or int(fields[6]) & _EXITING:
        return True
    try:
        status = (thread / "status").read_text(errors="replace")
    except OSError:
        return True
    killed = 1 << (signal.SIGKILL - 1)
    pending = (line.split()[1] for line in status.splitlines() if line.startswith(("SigPnd:", "ShdPnd:")))
    return any(int(word, 16) & killed for word in pending)


def _hung(process: int) -> tuple[str, Hang] | None:
    """Where it hangs, for a comparison, and the same in words."""
    name = _name(process)
    killed = dying(process)
    for thread in _threads(process):
        fields = _stat(thread)
        if not fields or fields[0] in "ZX":
            continue
        if fields[0] in "Tt" and not killed:
            how = "is held by a debugger" if fields[0] == "t" else "is stopped (SIGSTOP or Ctrl-Z)"
            return fields[0], Hang(process=process, name=name, why=how, stopped=True)
        call = _read(thread / "syscall")
        where = _where(thread, fields[0], call)
        if where:
            why = f"was killed and cannot end: it waits in {where}" if killed else f"waits in {where}"
            return call, Hang(process=process, name=name, why=why)
    return None


def _where(thread: Path, state: str, call: str) -> str:
    """The call in which a thread waits for a file system, with the path where it can be told; "" if it does not."""
    number, *arguments = call.split() or ["running"]
    known = platform.machine() == "x86_64" and number.isdecimal() and int(number) in _CALLS
    name = _CALLS[int(number)] if known else ""
    path = ""
    if known and int(number) in _OF_FILES and arguments:
        path = _link(thread / "fd" / str(int(arguments[0], 16)))
        if not path.startswith("/") or path.startswith(("/dev/", "/proc/")):
            return name if state == "D" else ""  # a socket or a pipe: whoever is at its other end is waited for
    elif state != "D" and not _in_a_file_system(thread):
        return ""
    if path:
        return f"{name} of {path}"
    return name or (f"the kernel ({_read(thread / 'wchan') or 'unknown'})" if state == "D" else "")


def _in_a_file_system(thread: Path) -> bool:
    # FUSE and NFS wait there asleep as long as nobody has signalled the thread, and in D afterwards.
    return _read(thread / "wchan").startswith(("request_wait_answer", "fuse_", "nfs", "rpc_", "__fuse"))


def _name(process: int) -> str:
    return _read(_PROC / str(process) / "comm") or "unknown"


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""  # gone, or another user's


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""


def _identity(handle: int) -> tuple[tuple[int, int], int]:
    """Device and inode as ``/proc/locks`` has them: the file system's, which stat hides on btrfs and overlays."""
    found = os.fstat(handle)
    device = (os.major(found.st_dev), os.minor(found.st_dev))
    inode = found.st_ino
    info = dict(
        line.split(":", 1) for line in _read(_PROC / "self" / "fdinfo" / str(handle)).splitlines() if ":" in line
    )
    mount = info.get("mnt_id", "").strip()
    if "ino" in info:
        inode = int(info["ino"])
    for line in _read(_PROC / "self" / "mountinfo").splitlines():
        words = line.split()
        if words[0] == mount:
            major, minor = words[2].split(":")
            device = (int(major), int(minor))
    return device, inode
