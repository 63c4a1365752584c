"""One thread that waits for many things at once, and never for one of them: `Loop`."""

from __future__ import annotations

import os
import queue
import selectors
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

__all__ = ["Loop"]


class Loop:
    """Calls who has something to hear. All in the thread that calls `wait`, but for `tell`."""

    def __init__(self) -> None:
        self._news: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self.on(self._bell, self._hear_news)

    def on(self, what: Any, hear: Callable[[], None]) -> None:
        """From now on call `hear` when there is something to read of `what`, a descriptor or an object with one."""
        self._selector.register(what, selectors.EVENT_READ, hear)

    def off(self, what: Any) -> None:
        """No longer. Idempotent."""
        with suppress(KeyError, ValueError):
            self._selector.unregister(what)

    def tell(self, news: Callable[[], None]) -> None:
        """Have `news` called by the loop's thread. From any thread."""
        self._news.put(news)
        os.eventfd_write(self._bell, 1)

    def wait(self, until: float) -> None:
        """Wait for whatever comes, or until this time of the monotonic clock, and call who has to hear of it."""
        for key, _ in self._selector.select(max(0.0, until - time.monotonic())):
            if self._is_on(key):  # it may have gone with one before
                key.data()

    def _is_on(self, key: selectors.SelectorKey) -> bool:
        try:
            return self._selector.get_key(key.fileobj) is key
        except (KeyError, ValueError):
            return False

    def _hear_news(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        while True:
            try:
                news = self._news.get_nowait()
            except queue.Empty:
                return
            news()
