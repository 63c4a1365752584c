"""Whether a run may still become a backup: said once, on disk, by whoever comes first.

A run is given up by whoever watches over its guest (scratch fills up, its process is gone, the user cancels), and is
claimed by its session right before it is recorded. Both make the same file in the run's private folder, and only one of
them can: so a run that was given up is never recorded, however late its datastore answers, and one that is just being
recorded is not given up any more. The file is durable before anybody acts on it.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path

from backupcore.errors import BackupError, dump_error, from_os_error, load_error
from backupcore.small_file import read_small

__all__ = ["FILE", "ROOM", "claim", "give_up", "given_up"]

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems without hard links say (link(2)): exFAT, some of FUSE."""

_WRITTEN_WITHIN = 0.5
"""Seconds in which a file that has been made without a link, and is still empty, gets what it says."""

FILE = "verdict"
"""Its name in the run's folder (`Context.folder`). JSON: null for a claimed run, else the error that ended it."""


ROOM = "room"
"""A file in the run's folder that keeps room there; it goes where the verdict finds none."""

_FULL = (errno.ENOSPC, errno.EDQUOT)


def give_up(folder: Path, error: BackupError) -> bool:
    """Say that the run of this folder comes to nothing, because of `error`. False if it was claimed before.

    True also where it had been given up already: the first error stays. OSError where the folder cannot be written to.
    """
    return _say(folder, dump_error(error)) or given_up(folder) is not None


def claim(folder: Path) -> None:
    """Say that the run of this folder is about to be recorded. Raises the error with which it was given up, if it was.

    Idempotent. Errors of the folder are those of the taxonomy.
    """
    try:
        first = _say(folder, None)
        error = None if first else given_up(folder)
    except OSError as problem:
        raise from_os_error(problem, f"the run's folder {folder}") from problem
    if error is not None:
        raise error


def given_up(folder: Path) -> BackupError | None:
    """The error with which the run of this folder was given up; None if it was not. OSError."""
    try:
        said = json.loads(_read(folder / FILE))
    except FileNotFoundError:
        return None
    except ValueError:
        said = {}  # written by somebody else: it cannot be told that the run was not given up
    if said is None:
        return None
    return load_error(said)


def _say(folder: Path, said: object) -> bool:
    """`_say_once`, in the room that was kept for it where there is no other."""
    try:
        return _say_once(folder, said)
    except OSError as error:
        if error.errno not in _FULL or not (folder / ROOM).exists():
            raise
    (folder / ROOM).unlink(missing_ok=True)
    return _say_once(folder, said)


def _say_once(folder: Path, said: object) -> bool:
    """Make the file; False if there is one. A link makes it appear whole, and only once."""
    own = folder / f"{FILE}.{os.getpid()}.{threading.get_native_id()}"
    own.unlink(missing_ok=True)
    try:
        _write(own, said)
        os.link(own, folder / FILE)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Whoever reads it meanwhile waits, see `_read`; one that is cut off here counts as given up.
        try:
            _write(folder / FILE, said)
        except FileExistsError:
            return False
    finally:
        own.unlink(missing_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    return True


def _read(path: Path) -> bytes:
    deadline = time.monotonic() + _WRITTEN_WITHIN
    while True:
        said = read_small(path)
        if said or time.monotonic() > deadline:
            return said
        time.sleep(0.005)


def _write(path: Path, said: object) -> None:
    """A new file, durable but for its name."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(handle, json.dumps(said).encode())
        os.fsync(handle)
    finally:
        os.close(handle)
