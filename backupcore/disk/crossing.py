"""Errors that cross from one process to another."""

from __future__ import annotations

import pickle
import traceback

from backupcore.errors import BackupError

__all__ = ["crossing"]


def crossing(error: BaseException) -> BaseException:
    """The error itself if it survives being pickled, else the nearest one that does.

    What it was raised in does not cross: where it is no member of the taxonomy, and so a bug, its traceback goes along
    as a note.
    """
    if not isinstance(error, BackupError | OSError):
        error.add_note("".join(traceback.format_exception(error)))
    try:
        again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    except Exception:  # noqa: BLE001 - a class that cannot be pickled, for whatever reason
        again = None
    if type(again) is type(error):
        return error
    if isinstance(error, BackupError):
        return BackupError(error.message, error.hint)
    return RuntimeError(f"{type(error).__name__}: {error}")
