"""The handshake: from a socket's path to an export in the transmission phase.

A QEMU whose NBD server is stopped while a client is half way through the handshake hangs for ever, guest and all. So
the handshake has a deadline, and no connection outlives an exception.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

from backupcore.disk.nbd.address import Address
from backupcore.disk.nbd.errors import ConnectionLost, NbdError, ProtocolError, printable

__all__ = ["MAX_TEXT", "Export", "Handshake", "connect"]

_MAGIC = b"NBDMAGIC"
_OPTION_MAGIC = 0x49484156454F5054  # "IHAVEOPT"
_OPTION_REPLY_MAGIC = 0x3E889045565A9

_FLAG_FIXED_NEWSTYLE, _FLAG_NO_ZEROES = 1, 2
_FLAG_HAS_FLAGS = 1

_OPT_GO, _OPT_STRUCTURED_REPLY, _OPT_SET_META_CONTEXT = 7, 8, 10
_REP_ACK, _REP_INFO, _REP_META_CONTEXT = 1, 3, 4
_REP_ERROR = 1 << 31
_REP_ERRORS = {
    _REP_ERROR | 1: "the option is not supported",
    _REP_ERROR | 2: "forbidden by the server's policy",
    _REP_ERROR | 3: "invalid request",
    _REP_ERROR | 4: "not supported on the server's platform",
    _REP_ERROR | 5: "TLS is required",
    _REP_ERROR | 6: "no such export",
    _REP_ERROR | 7: "the server is shutting down",
    _REP_ERROR | 8: "the server demands a block size",
    _REP_ERROR | 9: "the request is too big",
}
_INFO_EXPORT, _INFO_BLOCK_SIZE = 0, 3

_OPTION = struct.Struct(">QII")
_OPTION_REPLY = struct.Struct(">QIII")

_CREDENTIALS = struct.Struct("iII")  # struct ucred: process, user, group
_MAX_REQUEST = 32 << 20  # what the protocol allows where the server names no maximum; QEMU's too
MAX_TEXT = 65536  # of option replies and error messages: names are at most 4096 bytes
_MAX_SOCKET_PATH = 107  # sun_path of sockaddr_un, less its NUL
_BLOCK_SIZES = frozenset(1 << power for power in range(17))  # the protocol allows 1 byte to 64 KiB


@dataclass(frozen=True)
class Export:
    """What the handshake found out."""

    size: int
    flags: int
    contexts: dict[int, str]
    min_block: int
    max_request: int


def connect(address: Address, timeout: float) -> socket.socket:
    length = len(os.fsencode(address.socket))
    if length > _MAX_SOCKET_PATH:
        raise NbdError(
            f"the socket path {address.socket} has {length} bytes; unix sockets allow {_MAX_SOCKET_PATH}",
            "Use a shorter folder.",
        )
    if len(address.export.encode()) > 4096:
        raise NbdError(f"the export name on {address.socket} is longer than 4096 bytes")
    deadline = time.monotonic() + timeout
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)  # not inherited by children (PEP 446)
    try:
        while True:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection.connect(address.socket)
            except BlockingIOError:
                # A full backlog: a unix socket with a timeout does not wait for a place by itself.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                _expect_peer(connection, address)
                return connection
    except BaseException as error:
        connection.close()
        if isinstance(error, OSError):
            raise ConnectionLost(
                f"cannot connect to {address}: {error.strerror or error}",
                "Does the VM, or the program that serves the disk, still run? May this user open the socket?",
            ) from error
        raise


def _expect_peer(connection: socket.socket, address: Address) -> None:
    """NbdError unless the server is the process that it has to be: the kernel says who listens there (unix(7))."""
    if address.peer is None:
        return
    peer, _, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if peer != address.peer:
        raise NbdError(
            f"{address} is served by process {peer or 'of another namespace'}, not by {address.peer}, whose disk it "
            "should be; nothing was read",
            "Another program has put its socket in the place of QEMU's: find out which, with 'ps -fp' and 'ss -xlp'.",
        )


class Handshake:
    """From the greeting to the transmission phase, within one deadline."""

    def __init__(self, connection: socket.socket, address: Address, deadline: float) -> None:
        self._socket = connection
        self._address = address
        self._deadline = deadline

    def run(self, contexts: Sequence[str]) -> Export:
        try:
            self._greet()
            self._simple_option(_OPT_STRUCTURED_REPLY, "structured replies")
            granted = self._set_contexts(contexts) if contexts else {}
            return self._go(granted)
        except TimeoutError as error:
            raise ConnectionLost(
                f"{self._address}: the server did not finish the handshake in time",
                "Another client may hold the only connection that the server allows.",
            ) from error
        except OSError as error:
            raise ConnectionLost(
                f"{self._address}: the connection was lost in the handshake: {error.strerror or error}",
                "See whether the VM, or the program that serves the disk, still runs.",
            ) from error

    def _greet(self) -> None:
        if self._receive(8) != _MAGIC:
            raise self._broken("this is no NBD server")
        if int.from_bytes(self._receive(8)) != _OPTION_MAGIC:
            raise NbdError(f"{self._address}: the server speaks only the old NBD handshake, which is not supported")
        flags = int.from_bytes(self._receive(2))
        if not flags & _FLAG_FIXED_NEWSTYLE:
            raise NbdError(f"{self._address}: the server does not offer the fixed newstyle handshake")
        self._send((_FLAG_FIXED_NEWSTYLE | flags & _FLAG_NO_ZEROES).to_bytes(4))

    def _simple_option(self, option: int, what: str) -> None:
        self._ask(option, b"")
        kind, payload = self._reply(option)
        if kind & _REP_ERROR:
            raise self._denied(what, kind, payload)
        if kind != _REP_ACK:
            raise self._broken(f"a reply of type {kind} to the option {option}")

    def _set_contexts(self, contexts: Sequence[str]) -> dict[int, str]:
        names = [name.encode() for name in contexts]
        self._ask(
            _OPT_SET_META_CONTEXT,
            _counted(self._address.export) + len(names).to_bytes(4) + b"".join(_counted(name) for name in contexts),
        )
        granted: dict[int, str] = {}
        while True:
            kind, payload = self._reply(_OPT_SET_META_CONTEXT)
            if kind & _REP_ERROR:
                raise self._denied("metadata contexts", kind, payload)
            if kind == _REP_ACK:
                break
            if kind != _REP_META_CONTEXT or len(payload) < 4:
                raise self._broken(f"a reply of type {kind} and {len(payload)} bytes to the list of contexts")
            number, name = int.from_bytes(payload[:4]), payload[4:]
            if name not in names or number in granted or name.decode() in granted.values():
                raise self._broken(f"the context {printable(name)!r} was not asked for or came twice")
            granted[number] = name.decode()
        missing = [name for name in contexts if name not in granted.values()]
        if missing:
            raise NbdError(
                f"{self._address} has no metadata context {', '.join(map(repr, missing))}",
                "A dirty bitmap is missing, disabled or inconsistent, or was not exported.",
            )
        return granted

    def _go(self, contexts: dict[int, str]) -> Export:
        self._ask(_OPT_GO, _counted(self._address.export) + struct.pack(">HH", 1, _INFO_BLOCK_SIZE))
        size = flags = None
        smallest, largest = 1, _MAX_REQUEST
        while True:
            kind, payload = self._reply(_OPT_GO)
            if kind & _REP_ERROR:
                raise self._denied("opening it", kind, payload)
            if kind == _REP_ACK:
                break
            if kind != _REP_INFO or len(payload) < 2:
                raise self._broken(f"a reply of type {kind} and {len(payload)} bytes on opening the export")
            info = int.from_bytes(payload[:2])
            if info == _INFO_EXPORT:
                if len(payload) != 12:
                    raise self._broken(f"export information of {len(payload)} bytes")
                size, flags = struct.unpack(">QH", payload[2:])
            elif info == _INFO_BLOCK_SIZE:
                if len(payload) != 14:
                    raise self._broken(f"block size information of {len(payload)} bytes")
                smallest, _, largest = struct.unpack(">III", payload[2:])
        if size is None or flags is None or size >= 1 << 63 or not flags & _FLAG_HAS_FLAGS:
            raise self._broken(f"an export of {size} bytes with the flags {flags}")
        if smallest not in _BLOCK_SIZES or largest < smallest:
            raise self._broken(f"block sizes of {smallest} to {largest} bytes")
        largest = min(largest, _MAX_REQUEST)
        return Export(size, flags, contexts, smallest, largest - largest % smallest)

    def _ask(self, option: int, payload: bytes) -> None:
        self._send(_OPTION.pack(_OPTION_MAGIC, option, len(payload)) + payload)

    def _reply(self, option: int) -> tuple[int, bytes]:
        magic, answered, kind, length = _OPTION_REPLY.unpack(self._receive(_OPTION_REPLY.size))
        if magic != _OPTION_REPLY_MAGIC or answered != option or length > MAX_TEXT:
            raise self._broken(f"a reply to the option {answered} (magic {magic:#x}, {length} bytes) after {option}")
        return kind, self._receive(length)

    def _denied(self, what: str, kind: int, payload: bytes) -> NbdError:
        reason = _REP_ERRORS.get(kind, f"error {kind:#x}")
        text = printable(payload)
        return NbdError(f"{self._address}: the server refused {what}: {reason}" + (f" ({text})" if text else ""))

    def _broken(self, what: str) -> ProtocolError:
        return ProtocolError(f"{self._address}: the server broke the protocol in the handshake: {what}")

    def _receive(self, length: int) -> bytes:
        buffer = bytearray(length)
        view = memoryview(buffer)
        while view:
            self._limit()
            count = self._socket.recv_into(view)
            if count == 0:
                raise ConnectionResetError("the server closed the connection")
            view = view[count:]
        return bytes(buffer)

    def _send(self, data: bytes) -> None:
        self._limit()
        self._socket.sendall(data)

    def _limit(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)


def _counted(name: str) -> bytes:
    data = name.encode()
    return len(data).to_bytes(4) + data
