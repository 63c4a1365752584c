"""What an image itself says in its first bytes: no program is run, and no QEMU asked."""

from __future__ import annotations

import os
import stat
import struct

from backupcore.disk.geometry import MAGIC

__all__ = ["by_header", "lies_on_another"]

_SECTOR = 512
_START = struct.Struct(">4sIQIIQ")  # docs/interop/qcow2.txt: magic, version, backing name, cluster bits, size


def by_header(path: str, shape: str) -> int | None:
    """The size of an image of format `shape` (raw, qcow2), in whole sectors; None where it cannot be told.

    That of a running VM's is right, too: QEMU writes a new size into the header, or to the file, at once.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            mode = os.fstat(handle).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
                return None
            if shape == "raw":
                return -(-os.lseek(handle, 0, os.SEEK_END) // _SECTOR) * _SECTOR
            start = os.pread(handle, _START.size, 0)
        finally:
            os.close(handle)
    except OSError:
        return None
    if len(start) < _START.size or not start.startswith(MAGIC):
        return None
    return int(_START.unpack(start)[5])


def lies_on_another(path: str) -> bool:
    """Whether a qcow2 image has another one below it, as far as that can be told."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            start = file.read(_START.size)
    except OSError:
        return False
    return len(start) == _START.size and start.startswith(MAGIC) and bool(_START.unpack(start)[2])
