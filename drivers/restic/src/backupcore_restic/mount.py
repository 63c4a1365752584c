"""One ``restic mount`` for a whole run: what `restore` returns is read from it, at any offset, by any thread.

A ``restic dump`` for each file would derive the repository's key and load its index each time, and keeps one processor
busy. Where FUSE cannot be used everything is read by ``restic dump`` all the same (`backupcore_restic.dump`).
"""

from __future__ import annotations

import errno
import os
import select
import threading
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

from backupcore.disk.mountpoints import mount_points, unmount_below, unmount_command
from backupcore.errors import BackupError, TargetUnavailable
from backupcore_restic.mounted import Mounted
from backupcore_restic.repository import Repository
from backupcore_restic.stall import Stall

if TYPE_CHECKING:
    from backupcore import Context
    from backupcore.child import Child
    from backupcore_restic.driver import Restic
    from backupcore_restic.dump import DumpedArtifact

__all__ = ["Mount"]

KEPT = 120 << 20
"""Bytes for a mount: restic keeps 64 MiB of blobs, and makes some more of up to 8 MiB each.

Reading 2 GiB takes 7.4 s without a limit and 180 MiB of memory, 8.5 and 140 with this one, 11.8 and 125 with 96 MiB.
"""

LOOK = 5  # milliseconds between two looks at whether it is mounted


class Mount:
    """The mount of one repository in one run, made when it is first asked for, gone at the end of the run's context."""

    def __init__(self, options: Restic, ctx: Context) -> None:
        self._repository = Repository(options)
        self._limit = options.timeout
        self._ctx = ctx
        self._lock = threading.Lock()
        self._tried = False
        self._mounted: Mounted | None = None
        self._child: Child | None = None
        self._stall: Stall | None = None
        self._deleted: set[str] = set()
        self._judging = threading.Lock()
        self._verdicts: dict[tuple[str, str], BackupError] = {}

    def mounted(self) -> Mounted | None:
        """The mounted repository; None where it cannot be mounted, which the log says once."""
        with self._lock:
            if not self._tried:
                self._tried = True
                if reason := _missing() or self._start():
                    self._ctx.log.info("%s is read by restic dump, not mounted: %s", self._repository.name, reason)
            return self._mounted

    @property
    def serves(self) -> bool:
        """Whether it is there now; nothing is mounted for the question."""
        return self._mounted is not None

    def deleted(self, snapshots: set[str]) -> None:
        """Hide these: restic shows what it has found for another minute."""
        self._deleted |= snapshots

    def files(self, snapshot: str) -> dict[str, int] | None:
        """Name -> size of the plain files at a snapshot's root; None where only restic itself can tell."""
        mounted = None if snapshot in self._deleted else self.mounted()
        return mounted.files(snapshot) if mounted else None

    def _start(self) -> str:
        """Mount it. Returns why it cannot be, "" if it is."""
        ctx = self._ctx
        folder = Path(mkdtemp(prefix="restic-", dir=ctx.folder)).resolve()
        view = folder / "view"
        view.mkdir(mode=0o700)
        arguments = ["--no-lock", "mount", "--path-template=ids/%I", str(view)]
        with ExitStack() as stack:
            stack.callback(_clear, folder)
            # It works in its folder, by which a restic that outlives its run is found (`vmkeep recover`).
            child = stack.enter_context(self._repository.start(arguments, folder, **self._repository.sparing(KEPT)))
            child.release = partial(unmount_below, folder)  # a read that hangs ends with the mount
            stack.enter_context(ctx.on_cancel(child.stop))
            if reason := self._until_mounted(child, view):
                ctx.check()
                return reason
            mounted = Mounted(view / "ids", near=self._repository.folder is not None)
            stall = Stall(child, f"reading {self._repository.name}", None, self._limit, lambda: mounted.reading > 0)
            stack.enter_context(stall.watched())
            stack.callback(self._end, mounted)
            self._mounted, self._child, self._stall = mounted, child, stall
            ctx.stack.push(stack.pop_all())
        return ""

    def _until_mounted(self, child: Child, view: Path) -> str:
        output = select.poll()
        output.register(child.output, select.POLLIN)
        ready = threading.Event()
        child.while_moving(self._limit, busy=lambda: not ready.is_set())
        while str(view) not in mount_points():
            if (output.poll(LOOK) or not child.is_alive) and not child.output.read(1 << 16):
                code = child.wait()
                if child.late:  # a restic dump would wait for the same
                    self._ctx.check()
                    raise self._repository.failed(child, code, f"reading {self._repository.name}")
                return str(self._repository.failed(child, code, "restic mount"))
        ready.set()
        return ""

    def _end(self, mounted: Mounted) -> None:
        with self._lock:
            self._mounted = None
        mounted.close()

    def reason(self, error: OSError, dumped: DumpedArtifact, end: int) -> BackupError:
        """Why a read of that file up to the byte `end` failed so."""
        self._ctx.check()
        with self._judging:  # one restic dump, though several threads have met the same damage
            if self._mounted is None or self._child is None or self._stall is None:
                return TargetUnavailable(f"{dumped.what}: the run has ended")
            if error.errno == errno.EIO:
                file = dumped.snapshot, dumped.name
                if file not in self._verdicts:
                    self._verdicts[file] = dumped.reason(end)
                return self._verdicts[file]
            self._child.stop()
            code = self._child.wait()
            failed = self._repository.failed(self._child, code, f"{dumped.what}: restic has ended")
            # One that stood still tries again and again, and says so (its backends' retries), or says nothing.
            return failed if "returned error" in self._child.errors else self._stall.error or failed


def _missing() -> str:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse is missing, or not for this user"
    return "" if unmount_command() else "fusermount3 is not installed (Debian, Ubuntu: apt-get install fuse3)"


def _clear(folder: Path) -> None:
    unmount_below(folder)
    with suppress(OSError):  # still in use: it goes with the folder of the run
        (folder / "view").rmdir()
        folder.rmdir()
