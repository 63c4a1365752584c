"""Context: what a hook gets to work with."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from backupcore.errors import BackupError, Cancelled
from backupcore.strays import translated

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from backupcore.model import SourceRef

__all__ = ["Context", "Progress", "Silent"]


T = TypeVar("T")


class Progress(Protocol):
    """Where a run says how far it is. Called from any thread; must return at once."""

    def phase(self, name: str, total: int | None = None) -> None:
        """A new phase begins; `total` is its size in bytes, None where there is nothing to count."""

    def done(self, count: int) -> None:
        """So many bytes of this phase are done in all."""


class Silent:
    """A Progress that says nothing."""

    def phase(self, name: str, total: int | None = None) -> None:
        """Ignored."""

    def done(self, count: int) -> None:
        """Ignored."""


class Context:
    """The resources of one run, restore or other verb. Plugins keep no state of a run; they keep it here.

    - `stack`: register a resource the moment you hold it. Closed after `postbackup`, or at the end of a restore.
    - `once`: what several calls of one run share, as a connection.
    - `folder`: private to this run (0700); what lies in it is removed afterwards.
    - `progress`, `log`: for the user; neither ever gets a secret.
    - `cancelled`, `check`, `on_cancel`: the user may stop the work at any time, from another thread.
    - `on_touch`: what you have begun, and must have gone well before the guest is touched.
    - `touch`: the hypervisor says that it is about to touch the guest.
    - `on_complete`: what has to be looked at once all was read, before the run is recorded.
    - `release`: say that nothing more is read of the guest's disks, before a clean-up that may take long.
    - `released`: true once the guest is let go of.
    - `unrecorded`: what the datastore holds whole of a run that could not be recorded; None otherwise.
    - `owes`: say what the datastore still holds of this run, and should not.
    - `did`: say what you put right of a dead run.
    - `fail`: a watcher of yours (scratch is filling up, the guest is gone) stops the work with its error.
    """

    def __init__(self, folder: Path, *, progress: Progress | None = None, log: logging.Logger | None = None) -> None:
        self.folder = folder
        self.progress: Progress = progress or Silent()
        self.log = log or logging.getLogger("backupcore")
        self.stack = ExitStack()
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._callbacks: dict[object, Callable[[], None]] = {}
        self._failure: BackupError | None = None
        self._put_right: list[str] = []
        self._owed: list[str] = []
        self.unrecorded: SourceRef | None = None
        self.released = False
        self._releases: list[Callable[[], None]] = []
        self._touches: list[Callable[[], object]] = []
        self._completions: list[Callable[[], object]] = []
        self._making = threading.RLock()  # what is made may be made of something else that is shared
        self._made: dict[Hashable, object] = {}

    @property
    def put_right(self) -> tuple[str, ...]:
        """What `did` was told, in order."""
        return tuple(self._put_right)

    def did(self, what: str) -> None:
        """Say, in one line, what you have put right of what a dead run had left: host tooling tells it to the user."""
        self._put_right.append(what)

    @property
    def owed(self) -> tuple[str, ...]:
        """What `owes` was told, in order."""
        return tuple(self._owed)

    def owes(self, what: str) -> None:
        """Say, in one line, what of this run stays in the datastore though it should not: host tooling tells it."""
        self._owed.append(what)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gave when it was first called for `key` in this run; from any thread.

        Put a type of your own and the plugin itself into the key. What the result holds open belongs on `stack`. `make`
        may call `once` itself, for another key.
        """
        with self._making:
            if key not in self._made:
                self._made[key] = make()
            return cast("T", self._made[key])

    @property
    def cancelled(self) -> bool:
        """True once the user has asked to stop, or `fail` was called."""
        return self._event.is_set()

    @property
    def failure(self) -> BackupError | None:
        """The error given to `fail`, if any."""
        return self._failure

    def check(self) -> None:
        """Raise Cancelled (or the error given to `fail`) if the work is to stop. Call it in all that takes long."""
        if self._event.is_set():
            raise self._failure or Cancelled("cancelled")

    def wait(self, seconds: float) -> None:
        """Sleep, but wake up as `check` does when the work is to stop."""
        self._event.wait(seconds)
        self.check()

    @contextmanager
    def on_cancel(self, callback: Callable[[], None]) -> Iterator[None]:
        """While the block runs, a cancel calls `callback` (from another thread): end your child, close your socket.

        If the run is cancelled already, Cancelled is raised instead of entering the block.
        """
        key = object()
        with self._lock:
            self.check()
            self._callbacks[key] = callback
        try:
            yield
        finally:
            with self._lock:
                self._callbacks.pop(key, None)

    def on_touch(self, callback: Callable[[], object]) -> None:
        """Have `touch` call this, once: a question to the datastore that is under way may be answered meanwhile.

        What it raises ends the run before anything of the guest is touched.
        """
        with self._lock:
            self._touches.append(callback)

    def touch(self) -> None:
        """Say that the guest is about to be touched: a hypervisor calls it once all has been looked at.

        Raises what hinders the run by then; then nothing of the guest may be touched. The core calls it too, after
        `prebackup`, for a hypervisor that does not.
        """
        with self._lock:
            callbacks, self._touches = self._touches, []
        for callback in callbacks:
            with translated("a plugin", "what it was to do before the guest is touched"):
                callback()
        self.check()

    def on_complete(self, callback: Callable[[], object]) -> None:
        """Have the core call this once all was read and stored, before the run is recorded: an error ends the run then,
        and what was stored is withdrawn.
        """
        with self._lock:
            self._completions.append(callback)

    def complete(self) -> None:
        """Say that all was read and stored: the core calls it. What speaks against recording the run ends it."""
        with self._lock:
            callbacks, self._completions = self._completions, []
        for callback in callbacks:
            try:
                callback()
            except BackupError as error:
                self.fail(error)

    def on_release(self, callback: Callable[[], None]) -> None:
        """Have `release` call this, once, from whichever thread: the hypervisor lets the guest go there.

        It must return within seconds and must not wait for the datastore.
        """
        with self._lock:
            self._releases.append(callback)

    def release(self) -> None:
        """Say that nothing more is read of the guest's disks, so that the guest is let go of at once.

        A driver calls it before it tidies up after a failure or a cancel: a target that does not answer must not hold
        the guest meanwhile. Idempotent, from any thread; never raises. The core calls it too, as soon as `backup` has
        raised. Reads of the disks fail from then on.
        """
        with self._lock:
            callbacks, self._releases = self._releases, []
        released = bool(callbacks)
        for callback in callbacks:
            try:
                callback()
            except BaseException:
                released = False
                self.log.warning("the guest could not be released early", exc_info=True)
        self.released = self.released or released

    def fail(self, error: BackupError) -> None:
        """Stop the work because of `error`, which the run then ends with. The first error wins."""
        if not isinstance(error, BackupError):  # a plugin's mistake; the run must end with an error that can be told
            error = _made_one(error)
        with self._lock:
            if self._failure is None and not self._event.is_set():
                self._failure = error
        self.cancel()

    def cancel(self) -> None:
        """Stop the work: sets `cancelled`, then runs every callback once. An error in one does not spare the others."""
        with self._lock:
            self._event.set()
            callbacks = list(self._callbacks.values())
            self._callbacks.clear()
        for callback in callbacks:
            try:
                callback()
            except BaseException:
                self.log.warning("a callback failed while the run was being cancelled", exc_info=True)

    def __enter__(self) -> Context:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with translated("a plugin", "closing what it has put on the stack"):
                self.stack.__exit__(kind, error, trace)
        except BackupError as problem:
            if error is None:
                raise
            self.log.warning("after an error: %s", problem.in_full)  # which must not take the place of the first


def _made_one(error: object) -> BackupError:
    """What `translated` makes of an error that is none of the taxonomy."""
    try:
        with translated("a plugin", "stopping the run"):
            raise error if isinstance(error, BaseException) else TypeError(f"{type(error).__name__} is no error")
    except BackupError as made:
        return made
    raise AssertionError("unreachable")
