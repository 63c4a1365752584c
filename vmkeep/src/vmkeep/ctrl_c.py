"""Ctrl-C while a command starts, or ends: nothing is at work then that would have to be tidied up."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["end", "ends_at_once", "interrupted_at_once"]

end = os._exit
"""Ends this process at once. Others' calls of it are told while a command is at work, see `cli.ended`."""

_CANCELLED = 130  # that of `cli.exits`, which takes time to import


def ends_at_once(code: int = _CANCELLED) -> None:
    """From now on Ctrl-C ends this process without a word, with this exit code: there is nothing to be tidied up.

    Python's own answer is an exception wherever it happens to be: a traceback of an import, or of its own end. Where
    whoever started this process has Ctrl-C ignored it stays so.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda _number, _frame: end(code))


@contextmanager
def interrupted_at_once() -> Iterator[None]:
    """The same while the block runs, which only imports; in another than the main thread nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    ends_at_once()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
