"""Past the kernel's page cache (O_DIRECT, open(2)): what is moved once need not lie there.

A copy into the cache and a page for every 4 KiB cost more processor time than all else that is done with the bytes.
But each request waits for the disk, so it is done only where that is no loss. File systems must take the requests as
they are: others copy after all, or, over a network, wait for the server's disk. The disk must take one after the other
at its full speed: a spinning one without a cache of its own misses a turn after each, and an array with parity reads
what the request leaves of a stripe, which the cache would have filled.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import stat
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

__all__ = ["ALIGNED", "LEAST", "memory", "reopened", "streams", "suits"]

ALIGNED = 4096
"""Offset, length and memory of a request are multiples of so many bytes: no common disk has larger sectors."""

LEAST = 1 << 20
"""Bytes below which the cache is quicker: a request waits for the disk, and many small ones wait many times."""

_STRIPE = 128 << 10
"""Bytes of a stripe at most. A piece begins anywhere in one; of the smallest piece seven are whole."""

_KINDS = frozenset({"ext4", "xfs"})


def memory(size: int) -> memoryview:
    """`size` bytes that begin with a page. It costs page faults once: use it again."""
    pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # open(2): what arrives for memory that a fork shares at that moment may go to the child alone.
    pages.madvise(mmap.MADV_DONTFORK)
    with suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(pages)[:size]


def reopened(fd: int) -> int | None:
    """Another descriptor of an open file or block device, past the cache; None where that would be no gain.

    It allows what `fd` does, and is the caller's to close.
    """
    try:
        there = os.fstat(fd)
        is_disk = stat.S_ISBLK(there.st_mode)
        if (is_disk or _kind(there.st_dev) in _KINDS) and _streams(there.st_rdev if is_disk else there.st_dev):
            mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
            return os.open(f"/proc/self/fd/{fd}", mode | os.O_DIRECT | os.O_CLOEXEC)
    except (OSError, ValueError):
        pass  # no /proc or /sys that tells, or a descriptor that we were given of a file that we may not open
    return None


def suits(offset: int, data: memoryview) -> bool:
    """Whether `data` can go to, or come from, that offset past the cache, and is large enough to."""
    if len(data) < LEAST or len(data) % ALIGNED or offset % ALIGNED or data.readonly:
        return False
    return ctypes.addressof(ctypes.c_char.from_buffer(data)) % ALIGNED == 0


def streams(queue: Path) -> bool:
    """Whether a disk takes large requests one after the other at its full speed, by its folder ``queue`` in /sys.

    What its files say: the kernel's Documentation/ABI/stable/sysfs-block.
    """
    stripe = int((queue / "optimal_io_size").read_text())  # bytes; 0 for a disk that is no array
    spins = (queue / "rotational").read_text().strip() == "1"
    caches = (queue / "write_cache").read_text().strip() == "write back"
    return (not stripe or _STRIPE % stripe == 0) and (caches or not spins)


@lru_cache
def _streams(device: int) -> bool:
    place = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    own = place / "queue"
    return streams(own if own.is_dir() else place.parent / "queue")  # a partition has that of its disk


@lru_cache
def _kind(device: int) -> str | None:
    """The name of the file system on that device; None for one that has no device of its own."""
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        fields = line.split()
        if fields[2] == number:
            return fields[fields.index("-") + 1]  # proc(5): behind a number of optional fields
    return None
