"""Opening a small file in a folder that QEMU's user, or swtpm's, may write to: whatever it has put there instead.

A guest that has taken over its QEMU can leave a link to a file of the host there. It would be read by root, kept in the
backup, and given to the guest with the restore.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

__all__ = ["Strange", "open_file"]


class Strange(Exception):
    """What is there is not read; the text says why, after the path."""


def open_file(path: Path) -> int:
    """A handle for reading; the caller closes it. OSError as `open` has it; `Strange` if it is no regular file.

    `Strange` as well where the path leads through a link that was made neither by root nor by this process's user.
    """
    real = _real(path)
    try:
        handle = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # it has just become a link; a socket
            raise Strange("is no regular file") from error
        raise
    try:
        _check(handle, real)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _check(handle: int, real: str) -> None:
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        raise Strange("is no regular file")
    # Links that came into being since `_real` looked.
    if str(Path(f"/proc/self/fd/{handle}").readlink()) != real:
        raise Strange("has become another file")


def _real(path: Path) -> str:
    """Where the path leads, by the links of those that may decide it."""
    trusted = (0, os.geteuid())
    rest, at, links = list(path.parts[1:]), Path("/"), 0
    while rest:
        at = at / rest.pop(0)
        if at.name == "..":
            at = at.parent.parent
            continue
        if not at.is_symlink():
            continue
        if (owner := at.lstat().st_uid) not in trusted:
            raise Strange(f"is reached by a link that user {owner} has made ({at})")
        links += 1
        if links > 40:  # as the kernel does: path_resolution(7)
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        target = at.readlink()
        rest = [*target.parts[1 if target.is_absolute() else 0 :], *rest]
        at = Path("/") if target.is_absolute() else at.parent
    return str(at)
