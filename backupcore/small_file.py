"""A small file that somebody may have replaced: by a FIFO, which would be waited for, or by a device without an end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

__all__ = ["LIMIT", "NotAFile", "read_small", "require_file"]

LIMIT = 1 << 20
"""Bytes; what is read so is a hundredth of it."""

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
}


class NotAFile(OSError):
    """What lies in the place of a small file is no regular file, or far too large; `strerror` says what."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(errno.EINVAL, why)
        self.path = path


def require_file(path: Path) -> None:
    """NotAFile where something else than a regular file, or a link to one, lies at `path`; nothing may lie there."""
    try:
        _require(path, path.stat())
    except FileNotFoundError:
        return


def read_small(path: Path, limit: int = LIMIT) -> bytes:
    """What is in a regular file. NotAFile where it is none, or has more than `limit` bytes; OSError as for any file."""
    _require(path, path.stat())  # before it is opened, which is an action on some devices
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        _require(path, found)
        data = file.read(limit + 1) if found.st_size <= limit else b""
    if len(data) > limit or found.st_size > limit:
        raise NotAFile(path, f"it has more than {limit >> 10} KiB")
    return data


def _require(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise NotAFile(path, f"it is {_KINDS.get(stat.S_IFMT(found.st_mode), 'something else')}, not a file")
