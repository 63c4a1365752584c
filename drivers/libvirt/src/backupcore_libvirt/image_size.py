"""What an image itself says in its first bytes: no program is run, and no QEMU asked."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

from backupcore.disk.geometry import MAGIC

__all__ = ["by_header", "keeps_data_elsewhere", "lies_on_another", "stands_alone", "strange_kind"]

_SECTOR = 512
_START = struct.Struct(">4sIQIIQ")  # docs/interop/qcow2.txt: magic, version, backing name, cluster bits, size
_FEATURES, _FEATURES_AT = struct.Struct(">Q"), 72  # those that a program must know; of version 3 only
_DATA_FILE = 1 << 2
_KINDS = ((stat.S_ISFIFO, "a FIFO"), (stat.S_ISCHR, "a character device"), (stat.S_ISSOCK, "a socket"))


def strange_kind(path: str) -> str:
    """What is there, if it is neither a file, a folder nor a block device: reading such a thing may never end. Else "".

    libvirt reads it as well, where it is asked for the size of a disk that is off, and then answers nobody any more.
    """
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return ""  # whoever opens it says what is wrong
    return next((words for is_kind, words in _KINDS if is_kind(mode)), "")


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
    start = _start(path)
    return start is not None and bool(_START.unpack_from(start)[2])


def keeps_data_elsewhere(path: str) -> bool:
    """Whether a qcow2 image keeps its data in another file, as far as that can be told."""
    start = _start(path)
    return start is not None and _has_data_file(start)


def stands_alone(path: str) -> bool:
    """Whether a qcow2 image is there that has nothing below it and keeps its own data."""
    start = _start(path)
    return start is not None and not _START.unpack_from(start)[2] and not _has_data_file(start)


def _start(path: str) -> bytes | None:
    """The fixed part of a qcow2 header; None where there is none."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            start = file.read(_FEATURES_AT + _FEATURES.size) or b""
    except OSError:
        return None
    return start if len(start) == _FEATURES_AT + _FEATURES.size and start.startswith(MAGIC) else None


def _has_data_file(start: bytes) -> bool:
    version = int(_START.unpack_from(start)[1])
    return version >= 3 and bool(_FEATURES.unpack_from(start, _FEATURES_AT)[0] & _DATA_FILE)
