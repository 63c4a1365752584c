"""Ctrl-C, SIGTERM and the end of the terminal stop a run through its context, from a thread of their own."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from backupcore.context import Context

__all__ = ["cancels"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def cancels(ctx: Context) -> Iterator[None]:
    """While the block runs, SIGINT, SIGTERM and SIGHUP cancel `ctx`. Main thread only.

    Callbacks take locks that the main thread may hold at that moment, so they must not run in a signal handler, which
    runs on top of the main thread; and where that waits in a C call (libvirt), a Python handler would not run at all.
    The wake-up descriptor is written to by the C handler, at once.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def wait() -> None:
        while number := os.read(reader, 1):
            if number[0] in _SIGNALS:
                ctx.cancel()

    thread = threading.Thread(target=wait, name="vmkeep-interrupt", daemon=True)
    # nohup ignores SIGHUP on purpose. A shell ignores SIGINT of its background jobs, but who sends one means it.
    ours = [number for number in _SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _nothing) for number in ours}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)
        thread.join()
        os.close(reader)


def _nothing(_number: int, _frame: object) -> None:
    """SIG_IGN would not write to the wake-up descriptor, and children would inherit it."""
