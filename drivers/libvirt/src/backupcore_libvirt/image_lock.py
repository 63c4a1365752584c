"""QEMU's own lock on an image file, taken by us: while it is held no QEMU can open the file to write to it.

QEMU locks single bytes of the file itself (``block/file-posix.c``, the same since QEMU 2.10, for QEMUs of different
versions must understand each other): byte 100 + n says "I use permission n", byte 200 + n "nobody else may". Any other
program of QEMU, `qemu-nbd` above all, would have to understand the image first, which may be damaged.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from backupcore.errors import Busy, from_os_error

__all__ = ["keep_closed", "knows_locks"]

_USED, _REFUSED = 100, 200
_TRIED = 64
_WRITE, _RESIZE = 1, 3  # the bits of BLK_PERM_WRITE and BLK_PERM_RESIZE
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, pid
_UNKNOWN = (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def keep_closed(files: Sequence[Path]) -> Iterator[None]:
    """Until the end of the block nobody can open one of these files for writing, so no VM can start on it.

    Busy where somebody has one open already. Files that are not there are passed over, and so is a file system that
    knows no such locks: QEMU does the same. The lock lies on the file, not on its name: a renamed file keeps it.
    """
    with ExitStack() as stack:
        for file in files:
            try:
                handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # it may be a FIFO
            except FileNotFoundError:
                continue
            except OSError as error:
                raise from_os_error(error, f"lock {file}") from error
            stack.callback(os.close, handle)
            for permission in (_WRITE, _RESIZE):
                _refuse(handle, file, permission)
        yield


def knows_locks(file: Path) -> bool:
    """Whether QEMU's lock on this file keeps others out, by whatever name: tried, on a byte that QEMU does not use.

    Not on a device, where a lock is one node's, and libvirt gives each VM nodes of its own; nor where the file system
    grants every lock or none. What cannot be opened is taken for one that has locks: who reads it tells.
    """
    with ExitStack() as stack:
        handles = []
        try:
            for _ in range(2):
                handles.append(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
                stack.callback(os.close, handles[-1])
        except OSError:
            return True
        if not stat.S_ISREG(os.fstat(handles[0]).st_mode):
            return False
        try:
            fcntl.fcntl(handles[0], fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, _TRIED))
            answer = fcntl.fcntl(handles[1], fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, _TRIED))
        except OSError:
            return False
        return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


def _refuse(handle: int, file: Path, permission: int) -> None:
    # The order is QEMU's: first say what one refuses, then look who uses it. So of two at once one sees the other.
    try:
        fcntl.fcntl(handle, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, _REFUSED + permission))
        answer = fcntl.fcntl(handle, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, _USED + permission))
    except OSError as error:
        if error.errno in _UNKNOWN:
            return
        raise from_os_error(error, f"lock {file}") from error
    if struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK:
        raise Busy(f"{file} is open in another process", "Has its VM just been started? Power it off, then try again.")


def _flock(kind: int, byte: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0)
