"""Artifacts shown as ordinary files, for programs that read files: restic, rsync, cp.

The files are a rule, not a copy: a process of its own serves them by FUSE, and what a program reads is read from the
guest's disk at that moment. (A process that read its own mount could lock itself up.) Where FUSE is missing the
artifacts are written into a staging folder, and the log says so.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from backupcore.disk.mountpoints import mount_points, unmount, unmount_command
from backupcore.disk.staging import stage
from backupcore.errors import BackupError, ContractViolation
from backupcore.model import check_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from backupcore.model import Artifact

__all__ = ["View", "show"]

_START = 30.0  # seconds until the view must be mounted
_END = 3.0  # seconds for the process to end by itself

# -I and the parent's own path: the child must not import what lies in the current folder.
_CHILD = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); from backupcore.disk.mount import main; main()"
)


class View:
    """A folder in which every artifact is an ordinary, read-only file of exact size.

    `path` is that folder. `failed` is the first error of a read, or None; after it every read in a mounted view fails.
    `staged` is true where the files are copies.
    """

    def __init__(
        self, path: Path, log: logging.Logger, on_failure: Callable[[BackupError], None] | None = None
    ) -> None:
        self.path = path
        self.failed: BackupError | None = None
        self.staged = False
        self._log = log
        self._on_failure = on_failure
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raise the first error of a read, if there was one. Ask when the reader is done, well or not."""
        if self.failed:
            raise self.failed

    def _fail(self, error: BackupError) -> None:
        with self._lock:
            if self.failed:
                return
            self.failed = error
        if self._on_failure:
            try:
                self._on_failure(error)
            except Exception:  # noqa: BLE001 - its thread has more to hear from the view
                self._log.warning("what should happen after a failed read failed", exc_info=True)


@contextmanager
def show(
    artifacts: Sequence[Artifact],
    folder: Path,
    *,
    log: logging.Logger | None = None,
    on_failure: Callable[[BackupError], None] | None = None,
) -> Iterator[View]:
    """Show the artifacts as files in a fresh folder below `folder`, for the time of the block.

    `folder` is private to the run. The artifacts are pickled together, so what they share stays shared. Reads come in
    the reader's own size, in any order, several at once; errors of a read reach the reader as EIO and the caller as
    `View.failed`, and `on_failure` is called once, from another thread: end the reader there.

    When the block is left, however, the view is unmounted, its process is gone and with it every connection that it
    held, and the folder is removed. A parent that is killed leaves nothing mounted.

    Raises ContractViolation for artifacts that share a name or cannot be pickled. In a staging folder the artifacts
    are read before the block begins: their errors, and TargetFull, come from here.
    """
    log = log or logging.getLogger("backupcore")
    names = [check_name(artifact.name) for artifact in artifacts]
    if len(set(names)) != len(names):
        raise ContractViolation(f"artifacts of one name: {', '.join(sorted(names))}")
    path = Path(tempfile.mkdtemp(prefix="view-", dir=folder.resolve()))
    view = View(path, log, on_failure)
    try:
        reason = _missing()
        if not reason:
            process = _Process(view, log)
            try:
                reason = process.mount(artifacts)
                if not reason:
                    yield view
                    return
            finally:
                process.end()
        log.warning("no file view (%s): the backup is written to %s first", reason, path)
        view.staged = True
        stage(artifacts, path)
        yield view
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            log.warning("%s could not be removed", path)


class _Process:
    """The process that serves a view, from its start to its end."""

    def __init__(self, view: View, log: logging.Logger) -> None:
        self._view = view
        self._log = log
        self._child: subprocess.Popen[bytes] | None = None
        self._listener: threading.Thread | None = None
        self._errors = tempfile.TemporaryFile(dir=view.path.parent)  # noqa: SIM115 - closed in `end`
        self._heard = threading.Event()  # "ready", "refused", "broken", or the end of the process
        self._first = ("", "")
        self._ending = False

    def mount(self, artifacts: Sequence[Artifact]) -> str:
        """Start, and wait until the view is mounted. Returns why it cannot be mounted, or "" if it is."""
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C is for us: the view must outlive the reader
        )
        self._listener = threading.Thread(target=self._listen, name="file-view", daemon=True)
        self._listener.start()
        self._hand_over(artifacts)
        if not self._heard.wait(_START):
            return f"its process said nothing for {_START:.0f} seconds"
        kind, reason = self._first
        if kind == "broken":
            raise ContractViolation(f"the artifacts cannot be read in another process: {reason}")
        if kind == "ready":
            return ""
        return " ".join(filter(None, (reason, self._said())))

    def _hand_over(self, artifacts: Sequence[Artifact]) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        try:
            for what in (sys.path, str(self._view.path), list(artifacts)):
                pickle.dump(what, self._child.stdin, pickle.HIGHEST_PROTOCOL)
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended already; its message, or its end, says why
        except Exception as error:
            raise ContractViolation(f"the artifacts cannot be pickled: {type(error).__name__}: {error}") from error

    def _listen(self) -> None:
        """Hear what the process says, to its end. Runs in a thread of its own."""
        assert self._child is not None
        assert self._child.stdout is not None
        while True:
            try:
                kind, content = pickle.load(self._child.stdout)  # noqa: S301 - from our own child, over a pipe
            except Exception as error:  # noqa: BLE001 - EOFError at its end; anything else is its end for us, too
                if not self._first[0]:
                    self._first = ("ended", "its process ended")
                elif not self._ending:
                    cause = "" if isinstance(error, EOFError) else f" ({type(error).__name__}: {error})"
                    self._view._fail(BackupError(f"the process of the file view ended{cause}. {self._said()}".strip()))
                self._heard.set()
                return
            if kind == "failed":
                if not self._ending:
                    self._log.debug("a read in the file view failed: %s", content)
                    self._view._fail(content)
            else:
                self._first = (kind, content)
                self._heard.set()
                if kind != "ready":
                    return  # its end follows, and is no failure of the files that are staged instead

    def _said(self) -> str:
        """The end of what the process wrote to its standard error."""
        size = os.fstat(self._errors.fileno()).st_size
        return os.pread(self._errors.fileno(), 2000, max(0, size - 2000)).decode(errors="replace").strip()

    def end(self) -> None:
        """Unmount, and wait until the process is gone."""
        self._ending = True
        path = str(self._view.path)
        try:
            if path in mount_points() and not unmount(path):
                self._log.debug("%s is busy until the process of the view has ended", path)
            if self._child:
                self._reap(self._child)
            if path in mount_points() and not unmount(path):  # its process was killed, or hung until now
                self._log.warning("%s could not be unmounted", path)
            if self._listener:
                self._listener.join(_END)
            if said := self._said():
                self._log.debug("the process of the file view said: %s", said)
        finally:
            self._errors.close()

    def _reap(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdin is not None
        with contextlib.suppress(OSError):
            child.stdin.write(b"q")
        with contextlib.suppress(OSError):
            child.stdin.close()
        try:
            child.wait(_END)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        if self._listener:
            self._listener.join(_END)
        if child.stdout and not (self._listener and self._listener.is_alive()):
            child.stdout.close()


def _missing() -> str:
    """What a mount needs and is not here, or ""."""
    if not Path("/dev/fuse").exists():
        return "there is no /dev/fuse"
    if not unmount_command():
        return "fusermount3 is not installed: apt install fuse3"
    if not importlib.util.find_spec("mfusepy"):
        return "mfusepy is not installed: pip install 'backupcore[fileview]'"
    return ""
