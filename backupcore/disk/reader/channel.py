"""The way from an owner to its reader: a socket for words, a slot of shared memory for the bytes of disks.

The owner sends requests, the reader answers them in their order; several may be under way. A request is a `REQUEST`
(what, memory, source, offset, place in the memory, length). Memory 0 is the slot; any other is the owner's own
(`backupcore.disk.reader.shared`), which a `KNOW` with its descriptor has made known. For a call the request is followed
by that many bytes: the pickled function and its arguments. An answer is a `REPLY`: for a read how many bytes lie at
their place now; for a call, and for an error, so many bytes follow, the pickled result or exception. Both ends run the
same program and are one user's.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import pickle
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from backupcore.errors import BackupError, HypervisorError

__all__ = [
    "CALL",
    "ERROR",
    "KNOW",
    "LONGEST_WAIT",
    "PIECE",
    "READ",
    "REPLY",
    "REQUEST",
    "RESULT",
    "SLOT",
    "Channel",
    "mapped",
    "new",
    "send",
]

REQUEST = struct.Struct("<BxxxIIQQQ")
REPLY = struct.Struct("<BxxxxxxxQ")
READ, CALL, KNOW = 1, 2, 3
RESULT, ERROR = 1, 2

PIECE = 2 << 20
"""Bytes that are asked for at once, two blocks of `backupcore.disk.ahead`: each costs some changes of thread."""

SLOT = 4 * PIECE
"""Bytes of the shared memory of a channel."""

LONGEST_WAIT = 1
"""Seconds. A signal that arrives just before a system call blocks does not interrupt it, so no call waits longer."""

_LARGEST = 4 << 30  # bytes of a pickled result: the extents of the largest disk take less
_STEP = 1 << 20
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL  # cut off, it would kill whoever touches it


def send(connection: socket.socket, data: bytes) -> None:
    """Send all of it. OSError where the other end is gone."""
    view = memoryview(data)
    while view:
        try:
            view = view[connection.send(view, socket.MSG_NOSIGNAL) :]
        except BlockingIOError:  # nothing was taken for LONGEST_WAIT
            continue


def new(size: int) -> int:
    """A descriptor of so much shared memory, which the caller closes."""
    descriptor = os.memfd_create("backupcore", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def mapped(descriptor: int, size: int) -> memoryview:
    """The memory behind a descriptor, which may be closed then. ValueError, OSError if there is less of it."""
    return memoryview(mmap.mmap(descriptor, size))


class Channel:
    """The owner's end. For one thread at a time, but for `close`.

    `gone` makes the error of a reader that is not there any more. Every method raises that; `under_way` is how many
    requests have no answer yet, `in_step` whether it can be used again.
    """

    def __init__(self, control: socket.socket, gone: Callable[[], BackupError]) -> None:
        self._gone = gone
        self.under_way = 0
        self.in_step = True
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                memory = new(SLOT)
                try:
                    self.slot = mapped(memory, SLOT)
                    wait = struct.pack("ll", LONGEST_WAIT, 0)
                    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
                    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
                    socket.send_fds(control, [b"+"], [theirs.fileno(), memory], socket.MSG_NOSIGNAL)
                finally:
                    os.close(memory)
            except BaseException as error:
                ours.close()
                if isinstance(error, BrokenPipeError | ConnectionResetError):
                    raise gone() from error
                raise
        self._socket = ours
        self._inbox = bytearray()

    def read(self, *requests: tuple[int, int, int, int, int]) -> None:
        """Ask for bytes of a source: (memory, source, offset, place, length), each answered by one `answer`."""
        frames = b"".join(REQUEST.pack(READ, *request) for request in requests)
        self._send(frames)
        self.under_way += len(requests)

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...], within: float | None = None) -> Any:
        """Run it over there, and return its result or raise its error. TimeoutError after `within` seconds.

        No read may be under way.
        """
        assert not self.under_way
        data = pickle.dumps((function, arguments), pickle.HIGHEST_PROTOCOL)
        self._send(REQUEST.pack(CALL, 0, 0, 0, 0, len(data)) + data)
        return self._answered(None if within is None else time.monotonic() + within, pickled=True)

    def know(self, number: int, descriptor: int, size: int) -> None:
        """Make memory of the owner's known under this number, whichever channel names it then. No read is under way."""
        assert not self.under_way
        self.in_step = False
        try:
            socket.send_fds(self._socket, [REQUEST.pack(KNOW, number, 0, 0, 0, size)], [descriptor])
        except OSError as error:
            raise self._gone() from error
        self._answered(None, pickled=False)

    def answer(self) -> int:
        """The answer to the oldest read: how many bytes were read. Raises its error."""
        self.under_way -= 1
        count: int = self._answered(None, pickled=False)
        return count

    def close(self) -> None:
        """Give it up, from any thread: whoever waits for an answer is told that the reader is gone."""
        self.in_step = False
        with contextlib.suppress(OSError):  # the other end was first
            self._socket.shutdown(socket.SHUT_RDWR)

    def __del__(self) -> None:
        if hasattr(self, "_socket"):
            self._socket.close()

    def _answered(self, deadline: float | None, *, pickled: bool) -> Any:
        self.in_step = False
        kind, length = REPLY.unpack(self._take(REPLY.size, deadline))
        if kind == RESULT and not pickled:
            self.in_step = True
            return length
        if kind not in (RESULT, ERROR) or length > _LARGEST:
            raise HypervisorError(f"the process that reads the disks gave an answer of kind {kind}, which there is not")
        data = self._take(length)
        self.in_step = True
        try:
            content = pickle.loads(data)  # noqa: S301 - from a process of ours, over a socket that nobody else has
        except Exception as error:
            raise HypervisorError(f"an answer of the process that reads the disks cannot be used: {error}") from error
        if kind == RESULT:
            return content
        if not isinstance(content, BaseException):
            raise HypervisorError("the process that reads the disks gave an error that is none")
        raise content

    def _send(self, data: bytes) -> None:
        self.in_step = False
        try:
            send(self._socket, data)
        except OSError as error:
            raise self._gone() from error
        self.in_step = True

    def _take(self, length: int, deadline: float | None = None) -> bytes:
        inbox = self._inbox
        while len(inbox) < length:
            try:
                data = self._socket.recv(min(max(length - len(inbox), 4096), _STEP))
            except BlockingIOError:  # nothing came for LONGEST_WAIT
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError from None
                continue
            except OSError as error:
                raise self._gone() from error
            if not data:
                raise self._gone()
            inbox += data
        taken = bytes(inbox[:length])
        del inbox[:length]
        return taken
