"""A thread that may not be had: `aside`."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["aside"]


def aside(work: Callable[[], object], name: str) -> threading.Thread | None:
    """Have `work` done by a daemon thread of its own; where there is none to be had, done here, and None.

    For what must be done at any price, and should not be waited for: a limit on processes, or on memory, is reached
    just when a guest has to be let go of.
    """
    thread = threading.Thread(target=work, name=name, daemon=True)
    try:
        thread.start()
    except (RuntimeError, MemoryError):  # "can't start new thread"
        work()
        return None
    return thread
