"""A restic that moves no bytes any more, and would not end by itself.

restic 0.14 can wait for ever once a pack could not be saved (seen on a full file system, 1 run in 10): its uploaders
have ended with the error, and the flush at the end hands them the last pack with a context that nobody cancels. A
server that has gone without a word looks the same.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from backupcore.child import MOVED, Child, bytes_moved
from backupcore.errors import BackupError, TargetFull, TargetUnavailable

__all__ = ["Stall"]

FULL_AFTER = 10.0
"""Seconds without movement after which a local repository without room for another pack counts as full."""

ROOM = 16 << 20
"""Bytes: the least that restic wants to write at once, one pack."""

EVERY = 0.5


class Stall:
    """Stops `child` when it has neither read nor written for `limit` seconds while it was `busy`; `error` says why.

    `folder` is the repository, where that is a folder of this host. `said` counts what was read of the child's stdout:
    status lines go on for ever, and are no movement.
    """

    def __init__(
        self, child: Child, what: str, folder: Path | None, limit: float, busy: Callable[[], bool] = lambda: True
    ) -> None:
        self.said = 0
        self.error: BackupError | None = None
        self._child = child
        self._what = what
        self._folder = folder
        self._limit = limit
        self._busy = busy
        self._ended = threading.Event()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch while the block runs."""
        thread = threading.Thread(target=self._watch, name="restic-stall", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def _watch(self) -> None:
        before, idle = -MOVED, 0.0
        while not self._ended.wait(EVERY):
            seen = bytes_moved(self._child.pid)
            if seen is None:  # it runs as another user
                continue
            moved = seen - self.said
            if moved > before + MOVED or not self._busy():
                before, idle = moved, 0.0
                continue
            idle += EVERY
            if (idle >= FULL_AFTER and self._is_full()) or idle >= self._limit:
                self._child.expire()
                self.error = self._reason(idle)
                return

    def _is_full(self) -> bool:
        with suppress(OSError):
            return self._folder is not None and shutil.disk_usage(self._folder).free < ROOM
        return False

    def _reason(self, idle: float) -> BackupError:
        if self._is_full():
            return TargetFull(
                f"{self._what}: no space left on device",
                "Make room there (restic prune frees what deleted backups held), then run it again.",
            )
        return TargetUnavailable(
            f"{self._what}: restic has neither read nor written for {idle:.0f} s, and was ended",
            "Is the repository's server up and reachable from here, and does the hypervisor answer?",
        )
