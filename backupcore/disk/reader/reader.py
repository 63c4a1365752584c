"""The owner's end of a reader: `Reader`, and `start`."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from backupcore.disk.reader.channel import LONGEST_WAIT, PIECE, Channel
from backupcore.disk.reader.remote import RemoteBlocks, RemoteDisk
from backupcore.disk.reader.service import drop, forget, pair
from backupcore.disk.reader.shared import place_of
from backupcore.disk.reader.window import Target, Window
from backupcore.errors import BackupError, HypervisorError

if TYPE_CHECKING:
    from backupcore.disk.hashed import HashedDisk
    from backupcore.disk.qcow2 import Blocks

__all__ = ["Reader", "start"]

MOST = 16
"""Channels at once: threads of the owner that read at the same time; further ones wait. Each has its slot."""

KEPT = 4
"""Places at which somebody has read, each with its channel, that are remembered while nobody reads there."""

CLOSE_LIMIT = 3.0
"""Seconds that the process has to close a disk, or to end by itself, before it is killed."""

P = ParamSpec("P")
T = TypeVar("T")

# -I and the parent's own path: the child must not import what lies in the current folder.
_CHILD = (
    "import gc; gc.disable(); import pickle, socket, sys; control = socket.socket(fileno=int(sys.argv[1])); "
    "sys.path[:] = pickle.loads(control.recv(1 << 17)); "
    "from backupcore.disk.reader.service import serve; serve(control)"
)


class Reader:
    """The owner's end of a process that reads the disks of `vm` (its name, for messages).

    `control` is the owner's end of a `pair`; `pid` is the process that runs `serve` on the other one, which need not be
    a child of ours. Safe from several threads. Once the process has ended, whoever waits for it, and every further
    call, gets a HypervisorError.
    """

    def __init__(self, control: socket.socket, pid: int, vm: str = "") -> None:
        self.pid = pid
        self._control = control
        self._vm = vm
        self._closed = False
        self._changed = threading.Condition()  # re-entrant: a signal handler may close a disk
        self._idle: list[Window] = []  # the one used last at the end
        self._busy: set[Window] = set()
        self._telling = threading.Lock()
        self._told: set[int] = set()  # the numbers of the owner's memories that the process knows
        self._forgotten: list[int] = []  # those that are not there any more
        self._child: subprocess.Popen[bytes] | None = None
        try:
            self._process = os.pidfd_open(pid)
            weakref.finalize(self, os.close, self._process)  # not before: somebody may just be about to kill it
        except ProcessLookupError:
            self._process = -1

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def call(self, function: Callable[P, T], *arguments: P.args, **_none: P.kwargs) -> T:
        """Run a function, found by its name, in the process; return what it returns, raise what it raises.

        Function, arguments and result are pickled. Errors that cannot be become their nearest member of the taxonomy.
        """
        with self.window() as window:
            found: T = window.channel.call(function, arguments)
            return found

    def show(self, hashed: HashedDisk) -> RemoteDisk:
        """The same artifact, read over there; pickled it is `hashed` itself, which then reads by itself."""
        return RemoteDisk(self, hashed)

    def blocks(self, blocks: Blocks) -> Blocks:
        """The same blocks, read over there; pickled they are `blocks` themselves."""
        return RemoteBlocks(self, blocks)

    @contextmanager
    def window(self, source: int = 0, offset: int = 0) -> Iterator[Window]:
        """A window of one's own for the block, at this place: if possible the one that has read up to there."""
        window = self._taken(source, offset)
        try:
            window.move(source, offset)
            yield window
        finally:
            with self._changed:
                self._busy.discard(window)
                if window.channel.in_step and not self._closed:
                    self._idle.append(window)
                else:
                    window.channel.close()
                self._changed.notify()
            if window.is_written_to and not window.channel.in_step:
                self.kill()  # a buffer that the caller has back may still be filled

    def _taken(self, source: int, offset: int) -> Window:
        with self._changed:
            while True:
                if self._closed:
                    raise self.gone()
                if window := self._chosen(source, offset):
                    self._idle.remove(window)
                    break
                if len(self._busy) < MOST:
                    window = Window(self.channel())
                    break
                self._changed.wait(LONGEST_WAIT)
            self._busy.add(window)
            return window

    def _chosen(self, source: int, offset: int) -> Window | None:
        """An idle window: the one that stands there, one that stands nowhere, or else one too many."""
        for suits in (lambda one: one.stands_at(source, offset), lambda one: not one.in_use):
            if window := next(filter(suits, self._idle), None):
                return window
        if len(self._idle) >= KEPT or len(self._idle) + len(self._busy) >= MOST:
            return next(iter(self._idle), None)
        return None

    def target(self, buffer: memoryview) -> Target | None:
        """Where the buffer lies, if the process can fill it by itself and it is large enough to be worth it."""
        if len(buffer) < PIECE or (found := place_of(buffer)) is None:
            return None
        pages, known, place = found
        with self._telling:
            if known.number not in self._told:
                with self.window() as window:
                    if self._forgotten:
                        gone, self._forgotten = self._forgotten, []
                        window.channel.call(forget, (gone,))
                    window.channel.know(known.number, known.descriptor, len(pages))
                self._told.add(known.number)
                # Freed over there when the next one is told of: it may be collected in any thread, at any time.
                weakref.finalize(pages, self._forgotten.append, known.number).atexit = False
        return Target(known.number, place)

    def channel(self) -> Channel:
        """A new channel beside those of `window`, for the caller to close."""
        with self._changed:
            if self._closed:
                raise self.gone()
            return Channel(self._control, self.gone)

    def release(self, source: int) -> None:
        """Have a source closed: its connections are gone when this returns, if need be with the process."""
        try:
            # A channel beside those that are counted: they may all wait for a disk that does not answer.
            channel = self.channel()
            try:
                channel.call(drop, (source,), within=CLOSE_LIMIT)
            finally:
                channel.close()
        except (TimeoutError, OSError, BackupError):  # it does not answer, there are no descriptors, or it has ended
            self.kill()

    def kill(self) -> None:
        """End the process at once, and with it every connection of its own. Idempotent; from any thread."""
        if self._process >= 0:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(self._process, signal.SIGKILL)
            self._ended_within(CLOSE_LIMIT)

    def close(self) -> None:
        """End the process, for good. Idempotent; it waits for nothing but the end, and kills what does not end."""
        with self._changed:
            first, self._closed = not self._closed, True
            windows = [*self._idle, *self._busy]
            self._idle.clear()
            self._changed.notify_all()
        if not first:
            return
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        self._control.close()
        if not self._ended_within(CLOSE_LIMIT):
            self.kill()
        for window in windows:
            window.channel.close()

    def _ended_within(self, seconds: float) -> bool:
        """Whether the process is gone, after so many seconds at most."""
        if self._process < 0:
            return True
        # A pidfd becomes readable when its process ends, whoever its parent is.
        watched = select.poll()
        watched.register(self._process, select.POLLIN)
        ended = bool(watched.poll(seconds * 1000))
        if ended and self._child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(seconds)
        return ended

    def gone(self) -> BackupError:
        """The error of a process that is not there any more."""
        whose = f" of VM {self._vm}" if self._vm else ""
        if self._closed:
            return HypervisorError(f"the disks{whose} were read after they had been released")
        return HypervisorError(
            f"the process that reads the disks{whose} has ended{self._last_word()}",
            "If nobody ended it, the system's log may say why (out of memory?). Run it again.",
        )

    def _last_word(self) -> str:
        if self._child is None or not self._ended_within(0.5):
            return ""
        code = self._child.returncode
        if code is None:
            return ""
        return f" (signal {-code})" if code < 0 else f" (exit code {code})"


def start(vm: str = "") -> Reader:
    """A reader in a new process. Returns at once: the process gets ready meanwhile."""
    ours, theirs = pair()
    with theirs:
        try:
            child = subprocess.Popen(
                [sys.executable, "-I", "-c", _CHILD, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd="/",
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is for the run
            )
            ours.send(pickle.dumps(sys.path), socket.MSG_NOSIGNAL)
        except OSError as error:
            ours.close()
            raise HypervisorError(f"the process that reads the disks could not be started: {error}") from error
    reader = Reader(ours, child.pid, vm)
    reader._child = child
    return reader
