"""One connection to an export, for reads and block status; the transmission phase of the protocol."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Self

from backupcore.disk.nbd.address import Address
from backupcore.disk.nbd.admission import Leave
from backupcore.disk.nbd.errors import ConnectionLost, NbdError, ProtocolError, RequestFailed, printable
from backupcore.disk.nbd.handshake import MAX_TEXT, Handshake, connect

__all__ = ["LONGEST_WAIT", "Client", "Pending"]

_REQUEST_MAGIC = 0x25609513
_SIMPLE_REPLY_MAGIC = 0x67446698
_CHUNK_MAGIC = 0x668E33EF

_FLAG_READ_ONLY, _FLAG_SEND_DF, _FLAG_MULTI_CONN = 2, 128, 256

_CMD_READ, _CMD_DISC, _CMD_BLOCK_STATUS = 0, 2, 7
_CMD_FLAG_DF = 4
_CHUNK_DONE = 1
_CHUNK_NONE, _CHUNK_DATA, _CHUNK_HOLE, _CHUNK_STATUS = 0, 1, 2, 5
_CHUNK_IS_ERROR, _CHUNK_ERROR_OFFSET = 1 << 15, (1 << 15) | 2

_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IHHQ")  # all of a simple reply, and the beginning of a chunk, which goes on with its length
_CHUNK_SIZE = 20
_DATA_SIZE = 28  # and the offset that follows in a chunk of data

_MAX_STATUS_RANGE = 0xFFFF0000  # a request's length has 32 bits; kept a multiple of every legal block size
_MAX_STATUS_PAYLOAD = 16 << 20  # QEMU sends at most 1 MiB, nbdkit 8 MiB; more is an attack on memory
_MAX_IN_FLIGHT = 64  # see Client._start
# A signal that arrives just before a system call blocks does not interrupt it, and Python runs the handler (which may
# want to cancel, by closing this client) only when the call returns. So no wait is longer than this, in seconds.
LONGEST_WAIT = 1
_ZEROS = memoryview(bytes(1 << 20))


class _Request:
    """One request on the wire and what has come back for it."""

    __slots__ = ("chunks", "command", "cookie", "done", "error", "length", "offset", "status", "view")

    def __init__(self, command: int, cookie: int, offset: int, length: int, view: memoryview | None = None) -> None:
        self.command = command
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.view = view
        self.chunks: list[tuple[int, int]] = []  # (start, end) of the parts of a read that have arrived
        self.status: dict[str, list[tuple[int, int]]] = {}
        self.error: RequestFailed | None = None
        self.done = False

    def __str__(self) -> str:
        what = "read" if self.command == _CMD_READ else "block status"
        return f"{what} of {self.length} bytes at {self.offset}"


class Pending:
    """A read in flight. Until `result` returns, or the client is closed, the buffer is the client's."""

    __slots__ = ("_bounce", "_client", "_requests")

    def __init__(
        self, client: Client, requests: Sequence[_Request], bounce: tuple[memoryview, memoryview] | None
    ) -> None:
        self._client = client
        self._requests = requests
        self._bounce = bounce

    def result(self) -> None:
        """Wait until the buffer is filled. Raises RequestFailed or ConnectionLost; may be called again."""
        for request in self._requests:
            self._client._wait(request)
        # Only now: while any part is in flight its bytes may still arrive, so the caller must not get the
        # buffer back.
        for request in self._requests:
            if request.error is not None:
                raise request.error
        if self._bounce is not None:
            target, source = self._bounce
            target[:] = source


class Client:
    """One connection to one export, ready for use once built; a context manager.

    `contexts` are the metadata contexts that `block_status` shall report; one that the export lacks is an
    error. `timeout` (seconds) bounds the handshake as a whole. Reads have no limit of time, since storage may
    stall for minutes; `close` from another thread ends them.

    Raises NbdError (no such export, a missing context, a server that is too old), ConnectionLost (no server,
    deadline passed) or ProtocolError. Then nothing stays open.

    Attributes: `address`; `size` of the export; `contexts`, as granted, in the order asked for; `read_only`;
    `multi_conn` (several connections see the same bytes); `min_block`, the unit that the server wants
    requests to be multiples of (the client sees to it); `max_request`, the longest read that goes out as one
    request.
    """

    def __init__(self, address: Address, contexts: Sequence[str] = (), *, timeout: float = 30.0) -> None:
        self.address = address
        self.contexts = tuple(dict.fromkeys(contexts))
        # Re-entrant: close() may be called by a signal handler that interrupts this very client.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._send_lock = threading.Lock()
        self._requests: dict[int, _Request] = {}
        self._cookie = 0
        self._receiving = False
        self._early = b""  # what was received of the next thing in the stream
        self._users = 0  # threads inside a call on the socket; the last one out closes it
        self._lost: NbdError | None = None
        deadline = time.monotonic() + timeout
        self._admission = Leave(address.admission, timeout) if address.admission else None
        try:
            self._socket = connect(address, max(deadline - time.monotonic(), 0.001))
            try:
                export = Handshake(self._socket, address, deadline).run(self.contexts)
                self._socket.settimeout(None)
                # The kernel's timeout, not Python's: that one costs a poll() before every call.
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", LONGEST_WAIT, 0))
            except BaseException:  # whatever it was: a half-open connection hangs QEMU
                self._socket.close()
                raise
        except BaseException:
            if self._admission is not None:
                self._admission.close()
            raise
        self.size = export.size
        self.read_only = bool(export.flags & _FLAG_READ_ONLY)
        self.multi_conn = bool(export.flags & _FLAG_MULTI_CONN)
        self.min_block = export.min_block
        self.max_request = export.max_request
        self._context_names = export.contexts
        # Asked not to fragment, QEMU answers a failed read of the disk with its error. Otherwise it hangs up (seen with
        # 7.2), and nobody learns which block is bad; it also looks up the holes of every read, which we have done.
        self._read_flags = _CMD_FLAG_DF if export.flags & _FLAG_SEND_DF else 0
        if self._admission is not None:
            self._admission.watch(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of ``[offset, offset + length)``. `read_into` saves a copy."""
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview | bytearray) -> None:
        """Fill `buffer` with the bytes from `offset` on. Raises RequestFailed or ConnectionLost."""
        self.submit(offset, buffer).result()

    def submit(self, offset: int, buffer: memoryview | bytearray) -> Pending:
        """Ask for the bytes from `offset` on, to be written into `buffer`; collect with `Pending.result`.

        Requests longer than `max_request` are split. ValueError for a range outside of the export.
        """
        view = memoryview(buffer).cast("B")
        if view.readonly:
            raise ValueError("the buffer is read-only")
        length = len(view)
        self._check_range(offset, length)
        start, end = self._aligned(offset, length)
        bounce = None
        if (start, end) != (offset, offset + length):
            whole = memoryview(bytearray(end - start))
            bounce = view, whole[offset - start : offset - start + length]
            view = whole
        requests = [
            self._start(
                _CMD_READ,
                start + done,
                min(self.max_request, end - start - done),
                view[done : done + self.max_request],
            )
            for done in range(0, end - start, self.max_request)
        ]
        return Pending(self, requests, bounce)

    def block_status(self, offset: int, length: int) -> dict[str, list[tuple[int, int]]]:
        """What each context says of ``[offset, offset + length)``: [(length, flags)].

        The lengths of a context add up to `length`. Neighbours may have the same flags. For large disks see
        `walk_status`, which collects nothing.
        """
        found: dict[str, list[tuple[int, int]]] = {name: [] for name in self.contexts}
        for _, window in self.walk_status(offset, length):
            for name, entries in window.items():
                found[name] += entries
        return found

    def walk_status(self, offset: int, length: int) -> Iterator[tuple[int, dict[str, list[tuple[int, int]]]]]:
        """`block_status` in pieces, as the server answers: (offset, context -> [(length, flags)]).

        The lengths of every context of one piece add up to the same sum, and the next piece starts there.
        """
        if not self.contexts:
            raise ValueError("the client was opened without contexts")
        self._check_range(offset, length)
        position, end = offset, offset + length
        while position < end:
            start, stop = self._aligned(position, min(end - position, _MAX_STATUS_RANGE - self.min_block))
            request = self._start(_CMD_BLOCK_STATUS, start, stop - start)
            self._wait(request)
            if request.error is not None:
                raise request.error
            # A server may describe less than was asked for, and contexts may end at different places; and
            # more, past the end of the request, which is true today but not promised.
            covered = min(sum(size for size, _ in entries) for entries in request.status.values())
            reach = min(start + covered, stop, end)
            yield (
                position,
                {name: _cut(request.status[name], position - start, reach - position) for name in self.contexts},
            )
            position = reach

    def close(self) -> None:
        """Close the connection; from any thread or signal handler, at any time, more than once.

        Calls that wait, in any thread, end with ConnectionLost. When this returns the server sees the
        connection as closed.
        """
        idle = self._lost is None and not self._requests and self._send_lock.acquire(blocking=False)
        if idle:
            try:
                # Politeness only, so it must not wait: without it qemu-nbd logs a lost client.
                goodbye = _REQUEST.pack(_REQUEST_MAGIC, 0, _CMD_DISC, 0, 0, 0)
                self._socket.send(goodbye, socket.MSG_DONTWAIT)
            except OSError:
                pass
            finally:
                self._send_lock.release()
        self._fail(ConnectionLost(f"{self.address}: the connection was closed here"))

    # Ranges

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"{length} bytes at {offset} lie outside of {self.address} of {self.size} bytes")

    def _aligned(self, offset: int, length: int) -> tuple[int, int]:
        """(start, end) of the range, rounded out to the server's smallest block."""
        end = offset + length
        return offset - offset % self.min_block, min(end + -end % self.min_block, self.size)

    # Requests and replies

    def _start(self, command: int, offset: int, length: int, view: memoryview | None = None) -> _Request:
        # A server with full buffers stops reading requests until its replies are read. With nobody receiving,
        # the sending thread would then wait for ever, so it receives before that can happen.
        if len(self._requests) >= _MAX_IN_FLIGHT:
            self._receive_until(lambda: len(self._requests) < _MAX_IN_FLIGHT)
        with self._send_lock:
            with self._lock:
                self._check_alive()
                self._cookie += 1
                request = _Request(command, self._cookie, offset, length, view)
                self._requests[request.cookie] = request
                self._users += 1
            try:
                flags = self._read_flags if command == _CMD_READ else 0
                self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, flags, command, request.cookie, offset, length))
            except OSError as error:
                self._fail(self._gone(error), error)
                self._check_alive()
            except BaseException as error:  # a signal's exception: part of a request may have been sent
                self._fail(ConnectionLost(f"{self.address}: a request was interrupted"), error)
                raise
            finally:
                self._leave()
        return request

    def _wait(self, request: _Request) -> None:
        if not request.done:
            self._receive_until(lambda: request.done)

    def _receive_until(self, reached: Callable[[], bool]) -> None:
        """Until `reached` is true: read replies, or wait while another thread reads them."""
        with self._lock:
            while True:
                if reached():
                    return
                self._check_alive()
                if not self._receiving:
                    break
                self._changed.wait(LONGEST_WAIT)
            self._receiving = True
            self._users += 1
        try:
            while not reached():
                self._receive_chunk()
        except OSError as error:
            self._fail(self._gone(error), error)
        except ProtocolError as error:
            self._fail(error)
        except BaseException as error:  # a signal's exception: part of a chunk may have been read
            self._fail(ConnectionLost(f"{self.address}: a reply was interrupted"), error)
            raise
        finally:
            with self._lock:
                self._receiving = False
                self._changed.notify_all()  # one of those who wait reads on
            self._leave()
        if not reached():
            self._check_alive()

    def _receive_chunk(self) -> None:
        self._receive_early(_REPLY.size)
        magic, flags, kind, cookie = _REPLY.unpack_from(self._early)
        if magic == _SIMPLE_REPLY_MAGIC:
            self._early = self._early[_REPLY.size :]
            # The same 16 bytes: magic, error (32 bits), cookie. Legal for errors of commands other than read.
            request = self._find(cookie)
            number = flags << 16 | kind
            if number == 0:
                raise self._broken(f"a simple reply to the {request}")
            request.error = self._refused(request, number, "")
            self._finish(request)
            return
        if magic != _CHUNK_MAGIC:
            raise self._broken(f"a reply with the magic number {magic:#x}")
        request = self._find(cookie)
        self._receive_early(_CHUNK_SIZE)
        length = int.from_bytes(self._early[_REPLY.size : _CHUNK_SIZE])
        self._early = self._early[_CHUNK_SIZE:]
        if kind == _CHUNK_DATA and request.command == _CMD_READ:
            self._take_data(request, length)
        elif kind == _CHUNK_HOLE and request.command == _CMD_READ:
            self._take_hole(request, length)
        elif kind == _CHUNK_STATUS and request.command == _CMD_BLOCK_STATUS:
            self._take_status(request, length)
        elif kind & _CHUNK_IS_ERROR:
            self._take_error(request, kind, length)
        elif kind != _CHUNK_NONE:
            raise self._broken(f"a chunk of type {kind} in the reply to the {request}")
        elif length or not flags & _CHUNK_DONE:
            raise self._broken(f"an empty chunk with {length} bytes or without the final mark")
        if flags & _CHUNK_DONE:
            self._check_complete(request)
            self._finish(request)

    def _take_data(self, request: _Request, length: int) -> None:
        if length < 9:
            raise self._broken(f"a data chunk of {length} bytes")
        view = self._place(request, int.from_bytes(self._receive(8)), length - 8)
        self._receive_into(view)

    def _take_hole(self, request: _Request, length: int) -> None:
        if length != 12:
            raise self._broken(f"a hole chunk of {length} bytes")
        offset, size = struct.unpack(">QI", self._receive(12))
        view = self._place(request, offset, size)
        for start in range(0, size, len(_ZEROS)):
            view[start : start + len(_ZEROS)] = _ZEROS[: size - start]

    def _place(self, request: _Request, offset: int, length: int) -> memoryview:
        """The part of the caller's buffer that a chunk of a read goes to."""
        start, end = offset - request.offset, offset - request.offset + length
        if start < 0 or end > request.length or length == 0:
            raise self._broken(f"{length} bytes at {offset} in the reply to the {request}")
        chunks = request.chunks
        # In order and adjoining, as servers send them, there stays one entry however many chunks there are.
        if chunks and chunks[-1][1] == start:
            chunks[-1] = chunks[-1][0], end
        else:
            chunks.append((start, end))
        assert request.view is not None
        return request.view[start:end]

    def _take_status(self, request: _Request, length: int) -> None:
        if length < 12 or length > _MAX_STATUS_PAYLOAD or (length - 4) % 8:
            raise self._broken(f"a block status chunk of {length} bytes")
        payload = self._receive(length)
        number = int.from_bytes(payload[:4])
        name = self._context_names.get(number)
        if name is None or name in request.status:
            raise self._broken(f"block status of the context number {number}, which was not asked for or came twice")
        entries = [(size, flags) for size, flags in struct.iter_unpack(">II", memoryview(payload)[4:])]
        if any(size == 0 for size, _ in entries):
            raise self._broken(f"an empty extent in the block status of {name!r}")
        request.status[name] = entries

    def _take_error(self, request: _Request, kind: int, length: int) -> None:
        if length < 6 or length > MAX_TEXT:
            raise self._broken(f"an error chunk of {length} bytes")
        payload = self._receive(length)
        number, size = struct.unpack_from(">IH", payload)
        if number == 0 or 6 + size + (8 if kind == _CHUNK_ERROR_OFFSET else 0) > length:
            raise self._broken(f"an error chunk of {length} bytes with the error {number} and a text of {size}")
        if kind == _CHUNK_ERROR_OFFSET:
            offset = int.from_bytes(payload[6 + size : 14 + size])
            if not request.offset <= offset < request.offset + request.length:
                raise self._broken(f"an error at {offset} in the reply to the {request}")
        if request.error is None:
            request.error = self._refused(request, number, printable(payload[6 : 6 + size]))

    def _check_complete(self, request: _Request) -> None:
        if request.error is not None:
            return
        if request.command == _CMD_BLOCK_STATUS:
            missing = [name for name in self.contexts if name not in request.status]
            if missing:
                raise self._broken(f"no answer for the context {missing[0]!r}")
            return
        # Without this, bytes of the buffer that never arrived would be backed up as if they were the disk's.
        position = 0
        for start, end in sorted(request.chunks):
            if start != position:
                raise self._broken(f"a reply to the {request} with a gap or an overlap at {request.offset + start}")
            position = end
        if position != request.length:
            raise self._broken(f"only {position} bytes in the reply to the {request}")

    def _find(self, cookie: int) -> _Request:
        request = self._requests.get(cookie)
        if request is None:
            with self._lock:
                self._check_alive()  # closed meanwhile: what is left in the socket's buffer belongs to nobody
            raise self._broken("a reply to a request that was never made")
        return request

    def _finish(self, request: _Request) -> None:
        with self._lock:
            request.view = None
            request.done = True
            self._requests.pop(request.cookie, None)
            self._changed.notify_all()

    def _receive_early(self, least: int) -> None:
        """Have at least so many bytes in `_early`; up to all that precedes the bytes of a disk, in one system call."""
        while len(self._early) < least:
            try:
                data = self._socket.recv(_DATA_SIZE - len(self._early))
            except BlockingIOError:  # nothing came for LONGEST_WAIT
                continue
            if not data:
                raise ConnectionResetError("the server closed the connection")
            self._early += data

    def _receive(self, length: int) -> bytes:
        buffer = bytearray(length)
        self._receive_into(memoryview(buffer))
        return bytes(buffer)

    def _receive_into(self, view: memoryview) -> None:
        if self._early:
            early, self._early = self._early[: len(view)], self._early[len(view) :]
            view[: len(early)] = early
            view = view[len(early) :]
        while view:
            # MSG_WAITALL: the kernel fills the buffer in one call; a loop in Python would take the GIL for
            # each part.
            try:
                count = self._socket.recv_into(view, 0, socket.MSG_WAITALL)
            except BlockingIOError:  # nothing came for LONGEST_WAIT
                continue
            if count == 0:
                raise ConnectionResetError("the server closed the connection")
            view = view[count:]

    # Failure

    def _fail(self, reason: NbdError, cause: BaseException | None = None) -> None:
        """Give the connection up; the first reason stays. Wakes everyone who sends, receives or waits."""
        with self._lock:
            if self._lost is None:
                reason.__cause__ = cause
                self._lost = reason
                with contextlib.suppress(OSError):  # the peer was first
                    # Not close(): another thread may be inside a call on this descriptor, whose number could
                    # be given to a new file at once. After shutdown those calls end, and the peer sees the
                    # end.
                    self._socket.shutdown(socket.SHUT_RDWR)
                if self._admission is not None:
                    self._admission.end()
                self._requests.clear()
            self._changed.notify_all()
            self._dispose()

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            self._dispose()

    def _dispose(self) -> None:
        if self._lost is not None and self._users == 0:
            self._socket.close()

    def _check_alive(self) -> None:
        if self._lost is not None:
            # A new one for every thread: raised twice, one object would collect the tracebacks of both.
            raise type(self._lost)(self._lost.message, self._lost.hint) from self._lost.__cause__

    def _gone(self, error: OSError) -> ConnectionLost:
        return ConnectionLost(
            f"{self.address}: the connection was lost: {error.strerror or error}",
            "See whether the VM, or the program that serves the disk, still runs.",
        )

    def _broken(self, what: str) -> ProtocolError:
        return ProtocolError(f"{self.address}: the server broke the protocol: {what}")

    def _refused(self, request: _Request, number: int, text: str) -> RequestFailed:
        detail = f" ({text})" if text else ""
        return RequestFailed(f"{self.address}: {request} failed: {os.strerror(number)}{detail}", "", number)


def _cut(entries: Iterable[tuple[int, int]], skip: int, length: int) -> list[tuple[int, int]]:
    """The entries without their first `skip` bytes, and no more than `length` bytes of them."""
    found = []
    for size, flags in entries:
        if length <= 0:
            break
        if skip >= size:
            skip -= size
            continue
        taken = min(size - skip, length)
        found.append((taken, flags))
        skip = 0
        length -= taken
    return found
