"""A run in a thread of its own, and the main thread, which only waits for it, hears signals, and says how it stands.

The kernel gives a signal to the main thread, and Python runs its handler there. A main thread that waits in the kernel
for a datastore that does not answer would hear nothing; and nobody else could end a process that waits so. So a run
that was stopped, by the user or because it was given up, is waited for only so long.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from backupcore import process
from vmkeep import interrupt, lock

if TYPE_CHECKING:
    from backupcore.context import Context
    from backupcore.model import VM, BackupRun
    from vmkeep.taken import Taken

__all__ = ["RELEASED", "UnderWay", "attended", "end_at_once", "left_behind", "spoilt"]

T = TypeVar("T")

RELEASED = "released"
"""A file in the folder of a run that was stopped, once its guest is let go of: for `vmkeep cancel`."""

LIMIT = 60.0
"""Seconds that a run which was stopped may take to tidy up at its datastore; what is left, the next run sweeps."""
PATIENCE = 3.0
"""Seconds after which it is said what a run that was stopped still waits for."""
_RELEASE = 10.0  # seconds that a guest may take to be let go of
_LOOK = 0.2
_NAME = "vmkeep-run"
_spoilt = threading.Event()
_ENDED = 0  # no signal has this number


@dataclass(kw_only=True)
class UnderWay:
    """What is known of a run while it goes on; each is set once, by the thread that works, and None before.

    `remark` shows a line to the user.
    """

    datastore: str
    remark: Callable[[str], None]
    vm: VM | None = None
    run: BackupRun | None = None
    ctx: Context | None = None
    recorded: Taken | None = None
    _marked: bool = False
    _marking: threading.Lock = field(default_factory=threading.Lock)

    def say(self, line: str) -> None:
        """Show a line to the user; the terminal may be gone, which must not end anything."""
        with suppress(OSError, ValueError):
            self.remark(line)

    def mark_released(self) -> None:
        """Let other processes see that the guest is let go of, as long as the run has its folder. Idempotent."""
        with self._marking, suppress(OSError):
            if self.ctx is not None and not self._marked:
                self._marked = True
                (self.ctx.folder / RELEASED).touch()

    def folder_goes(self) -> None:
        """The run's folder is about to be removed: nothing is put into it any more."""
        with self._marking:
            self._marked = True

    @property
    def released(self) -> bool:
        """Whether nothing is held of the guest any more, as far as this process can tell."""
        return self.ctx is not None and self.ctx.released

    def standing(self) -> str:
        """In one line: how the guest is, and what this process still waits for."""
        name = self.vm.name if self.vm else "the VM"
        guest = f"the guest of {name} runs on" if self.released else f"{name} is being let go of"
        own = os.getpid()
        hangs = process.hangs([own, *process.children(own)])
        if hangs:
            return f"{guest}; datastore {self.datastore} does not answer: {'; '.join(map(str, hangs))}"
        return f"{guest}; datastore {self.datastore} is still being tidied up"


def attended(work: Callable[[], T], abandoned: Callable[[], T], under_way: UnderWay) -> T:
    """What `work` returns or raises, which runs in a thread of its own that lives as long as the work.

    After a signal, or once its context was cancelled, it is waited for no longer than `LIMIT` seconds, or until a
    second Ctrl-C, and not at all once something has closed its files: each call on them may wait for ever. Then the
    result is what `abandoned` returns or raises. The thread stays behind, and the process must
    be ended without waiting for it (`left_behind`). Where the caller is not the main thread, it does the work itself.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    stop = interrupt.Stop()
    # Of all queues this one alone may be put to from a signal handler.
    events: queue.SimpleQueue[int] = queue.SimpleQueue()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with interrupt.heard_by(stop):
                results.append(work())
        except BaseException as error:  # noqa: BLE001 - it is raised in the main thread
            errors.append(error)
        finally:
            events.put(_ENDED)

    # Daemon: one that waits in the kernel must not hold the end of the process.
    thread = threading.Thread(target=run, name=_NAME, daemon=True)
    with interrupt.handled(events.put):
        thread.start()
        if not _ended(events, stop, under_way):
            return abandoned()
        thread.join()
    if errors:
        raise errors[0]
    return results[0]


def end_at_once() -> None:
    """Have the process end without tidying up: a plugin has closed files, which others would now close again."""
    _spoilt.set()


def spoilt() -> bool:
    """Whether that was asked for: no file may be written to any more, since another's number may be its own by now."""
    return _spoilt.is_set()


def left_behind() -> bool:
    """Whether the process must end at once: a thread of `attended` is still at work, and Python would wait for it."""
    return _spoilt.is_set() or any(thread.name == _NAME for thread in threading.enumerate())


def _ended(events: queue.SimpleQueue[int], stop: interrupt.Stop, under_way: UnderWay) -> bool:
    """Wait for the end of the work: True when it has ended, False where it is not waited for any longer."""
    stopped: float | None = None
    told = False
    wishes = 0
    while True:
        with suppress(queue.Empty):
            event = events.get(timeout=_LOOK)
            if event == _ENDED:
                return True
            # Only Ctrl-C again is a second wish: systemd, a shell and `vmkeep cancel` may each send a SIGTERM.
            wishes += event == signal.SIGINT
            if not stop.asked:
                stop.ask()
        if under_way.vm is not None and lock.is_lost(under_way.vm):
            end_at_once()
            return False
        if stopped is None:
            if not stop.asked and not (under_way.ctx is not None and under_way.ctx.cancelled):
                continue
            stopped = time.monotonic()
        since = time.monotonic() - stopped
        if under_way.released:
            under_way.mark_released()
        if since < PATIENCE:
            continue
        if since > LIMIT or (wishes > 1 and (under_way.released or since > _RELEASE)):
            return False
        if not told:
            told = True
            left = f"this ends within {LIMIT - since:.0f} s"
            under_way.say(f"{under_way.standing()}; {left}{', at once with another Ctrl-C' if wishes else ''}")
