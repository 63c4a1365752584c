"""A state folder without room: what is said of it, wherever a write to it meets that."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from backupcore import errors
from backupcore.errors import BackupError, TargetFull

__all__ = ["from_os_error", "full", "has_no_room"]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
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
    return errors.from_os_error(error, what)


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
