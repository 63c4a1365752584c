"""A small file that a restore makes."""

from __future__ import annotations

import os
from pathlib import Path

from backupcore.errors import from_os_error

__all__ = ["write_new"]


def write_new(path: Path, data: bytes, final: Path) -> None:
    """Write `data` to `path`, which must not exist, for its owner alone; on the disk when this returns.

    Errors name `final`, the name that it will have: the user knows no other.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise from_os_error(error, f"writing {final}") from error
