"""Descriptors that hold a lock, and are this process's alone.

A flock belongs to the open file, and a forked child has that as well: a worker process of a driver
(`multiprocessing` forks) that outlives a run which was killed would keep its locks for ever. So a child closes them as
soon as it is there, which does not unlock them here.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress

__all__ = ["keep_from_children", "let_go"]

_own: dict[int, os.stat_result] = {}
_changing = threading.Lock()


def keep_from_children(handle: int) -> int:
    """Have forked children close this descriptor at once, as long as it is this file's; returns it."""
    with _changing:
        _own[handle] = os.fstat(handle)
    return handle


def let_go(handle: int) -> None:
    """Forget a descriptor that is about to be closed. Idempotent."""
    with _changing:
        _own.pop(handle, None)


def _close() -> None:
    _changing.release()
    for handle, found in _own.items():
        with suppress(OSError):  # a plugin may have closed it, and the number be another file's by now
            if os.path.samestat(os.fstat(handle), found):
                os.close(handle)
    _own.clear()


# The lock is held across the fork, so that the child never finds it taken by a thread that it does not have.
os.register_at_fork(before=_changing.acquire, after_in_parent=_changing.release, after_in_child=_close)
