"""Ctrl-C, SIGTERM and the end of the terminal stop a run through its context, never from within a signal handler.

Callbacks of a cancel take locks that the interrupted thread may hold at that moment, and may take long; so they run in
threads of their own.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from backupcore.context import Context
from backupcore.errors import BackupError, Cancelled
from backupcore.thread import aside

__all__ = ["Stop", "cancels", "check", "handled", "heard_by"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CALLBACKS = 10.0  # seconds that a block's end waits for the callbacks of its cancel

_here = threading.local()


class Stop:
    """The wish to stop a run that works in another thread, and what it reaches: the contexts of that thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._contexts: list[Context] = []
        self._threads: dict[int, list[threading.Thread]] = {}
        self.asked = False

    def ask(self) -> None:
        """Cancel what is under way, and whatever begins later. Returns at once."""
        with self._lock:
            self.asked = True
            for ctx in self._contexts:
                self._cancel(ctx)

    @contextmanager
    def reaches(self, ctx: Context) -> Iterator[None]:
        """While the block runs, `ask` cancels `ctx`, and has its guest let go of."""
        with self._lock:
            self._contexts.append(ctx)
            if self.asked:
                self._cancel(ctx)
        try:
            yield
        finally:
            with self._lock:
                self._contexts.remove(ctx)
                threads = self._threads.pop(id(ctx), [])
            for thread in threads:
                thread.join(_CALLBACKS)

    def _cancel(self, ctx: Context) -> None:
        # Two threads: a callback that hangs, as one that closes a file on a dead target, must not hold the guest.
        for work in (ctx.cancel, lambda: _release(ctx)):
            thread = aside(work, "vmkeep-cancel")
            if thread is not None:
                self._threads.setdefault(id(ctx), []).append(thread)


def _release(ctx: Context) -> None:
    with suppress(BackupError):  # what its reads fail with must be the cancel, not the end of the export
        ctx.wait(_CALLBACKS)
    ctx.release()


@contextmanager
def heard_by(stop: Stop) -> Iterator[None]:
    """What `cancels` puts under way in this thread while the block runs is reached by `stop`."""
    _here.stop = stop
    try:
        yield
    finally:
        del _here.stop


def check() -> None:
    """Raise Cancelled if the run of this thread is to stop: between steps that have no context to tell it."""
    stop: Stop | None = getattr(_here, "stop", None)
    if stop is not None and stop.asked:
        raise Cancelled("cancelled")


@contextmanager
def cancels(ctx: Context) -> Iterator[None]:
    """While the block runs, SIGINT, SIGTERM and SIGHUP cancel `ctx`.

    In a thread that somebody attends to (`heard_by`), through that; else in the main thread only.
    """
    stop: Stop | None = getattr(_here, "stop", None)
    if stop is not None:
        with stop.reaches(ctx):
            yield
        return
    with _by_descriptor(ctx.cancel):
        yield


@contextmanager
def handled(handler: Callable[[int], None]) -> Iterator[None]:
    """While the block runs, `handler` gets each SIGINT, SIGTERM and SIGHUP, in the main thread; main thread only."""
    before = {number: signal.signal(number, lambda found, _frame: handler(found)) for number in _ours()}
    _handling.append(before)
    try:
        yield
    finally:
        _handling.pop()
        for number, old in before.items():
            signal.signal(number, old)


_handling: list[object] = []
_before_fork = threading.local()


def _hold_back() -> None:
    """Before a fork: a SIGTERM that comes before the child has left our handler must wait, and not be lost."""
    if _handling:
        _before_fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _let_come() -> None:
    mask = _before_fork.__dict__.pop("mask", None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _end_by_a_signal() -> None:
    """A child that a plugin has forked, as multiprocessing does, ends by SIGTERM, and tells nobody here of it.

    With our handler it would stay, and whoever has sent it (`Pool.terminate`) waits for its end; through our wake-up
    descriptor, which it has as well, it would cancel what is at work here.
    """
    if _handling:
        with suppress(ValueError):  # not in the main thread of the interpreter
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _let_come()


os.register_at_fork(before=_hold_back, after_in_parent=_let_come, after_in_child=_end_by_a_signal)


def _ours() -> list[signal.Signals]:
    # nohup ignores SIGHUP on purpose. A shell ignores SIGINT of its background jobs, but who sends one means it.
    return [number for number in _SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


@contextmanager
def _by_descriptor(cancel: Callable[[], None]) -> Iterator[None]:
    """Where the main thread itself works: it may wait in a C call (libvirt), in which no Python handler would run.

    The wake-up descriptor is written to by the C handler, at once, and read by a thread.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def wait() -> None:
        with suppress(OSError):  # a plugin has closed it, and ends this command by that
            while number := os.read(reader, 1):
                if number[0] in _SIGNALS:
                    cancel()

    thread = threading.Thread(target=wait, name="vmkeep-interrupt", daemon=True)
    # A handler that does nothing: SIG_IGN would not write to the wake-up descriptor, and children would inherit it.
    with handled(lambda _number: None):
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            with suppress(OSError):  # as above
                os.close(writer)
            thread.join()
            with suppress(OSError):
                os.close(reader)
