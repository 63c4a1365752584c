"""A state folder without room, or that cannot be written to: what is said of it, and what goes on all the same.

On the day of a restore it may lie on a disk that is full, or mounted read-only by a rescue system. What only reads then
does without what it would write there.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from backupcore import errors, verdict
from backupcore.errors import AccessDenied, BackupError, ConfigError, TargetFull
from backupcore.small_file import NotAFile

__all__ = ["UNWRITABLE", "from_os_error", "full", "has_no_room", "require_room", "room_for_the_record"]

UNWRITABLE = (TargetFull, AccessDenied)
"""What a write to such a state folder raises."""

RECORD_ROOM = 1 << 20
"""Bytes that the record of a backup takes at most: the pages of the catalog that it changes, once in its log and once
in the file, and what SQLite maps."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_LITTLE = 1 << 20  # bytes: the digests of 2 GiB
_PROBE = 256 << 10  # bytes; more than SQLite wants at once for what it maps of a small catalog


def full(state: Path) -> TargetFull:
    """The error of a write to a state folder whose file system is full, or its owner's quota there."""
    return TargetFull(
        f"the file system of the state folder {state} is full",
        "Make room there (is there a quota?): vmkeep keeps its catalog, its locks and the records of runs in it. Then "
        "run it again.",
    )


def from_os_error(error: OSError, what: str, state: Path) -> BackupError:
    """As `backupcore.errors.from_os_error`, for what lies in the state folder."""
    if error.errno in _NO_ROOM:
        return full(state)
    if isinstance(error, NotAFile):
        # By its own name: `what` may be more than this file, and is not to be removed.
        return ConfigError(
            f"{error.path}: {error.strerror}", "Somebody has put that there. Remove it: vmkeep makes such a file anew."
        )
    return errors.from_os_error(error, what)


def require_room(state: Path) -> None:
    """TargetFull where what a restore puts down besides (a disk's digests) would hardly find room, as statvfs tells.

    FileNotFoundError where there is no such folder yet.
    """
    try:
        found = os.statvfs(state)
    except FileNotFoundError:
        raise
    except OSError:
        return  # whoever makes something there says what is wrong
    if found.f_bavail * found.f_frsize < _LITTLE:
        raise full(state)


def has_no_room(folder: Path) -> bool:
    """Whether not even a small file finds room there. By trying: a quota is seen in no other way."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_PROBE))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return error.errno in _NO_ROOM
    return False


@contextmanager
def room_for_the_record(folder: Path, state: Path) -> Iterator[Path]:
    """Hold `RECORD_ROOM` in a run's folder, for its verdict and its record; who records removes it. TargetFull at once.

    Asked for before the guest is touched: a backup that is stored and cannot be recorded is no use to anybody.
    """
    room = folder / verdict.ROOM
    try:
        handle = os.open(room, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(handle, 0, RECORD_ROOM)
        finally:
            os.close(handle)
    except OSError as error:
        with suppress(OSError):
            room.unlink()
        raise from_os_error(error, f"the run's folder {folder}", state) from error
    try:
        yield room
    finally:
        with suppress(OSError):
            room.unlink(missing_ok=True)
