"""An NBD server that does what a test tells it, also what no honest server does."""

from __future__ import annotations

import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from backupcore.disk.nbd import Address

LIMIT = 20.0
OPTION_MAGIC = 0x49484156454F5054
REPLY_MAGIC = 0x3E889045565A9

READ, DISC, BLOCK_STATUS = 0, 2, 7
DONE = 1
NONE, DATA, HOLE, STATUS, ERROR, ERROR_OFFSET = 0, 1, 2, 5, 32769, 32770
ACK, INFO, META, ERR_UNSUP, ERR_UNKNOWN = 1, 3, 4, 0x80000001, 0x80000006
GO, STRUCTURED, SET_META = 7, 8, 10


class Request(NamedTuple):
    command: int
    cookie: int
    offset: int
    length: int


class Wire:
    """The server's end of one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        connection.settimeout(LIMIT)

    def receive(self, length: int) -> bytes:
        """Exactly `length` bytes; EOFError where the client has gone."""
        data = bytearray()
        while len(data) < length:
            part = self._socket.recv(length - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def send(self, *parts: bytes) -> None:
        self._socket.sendall(b"".join(parts))

    def ended(self) -> bool:
        """Wait until the client has closed; False if it sends something instead."""
        try:
            return self._socket.recv(1) == b""
        except ConnectionResetError:
            return True

    # Handshake

    def greet(self, flags: int = 3) -> None:
        self.send(b"NBDMAGIC", OPTION_MAGIC.to_bytes(8), flags.to_bytes(2))
        assert self.receive(4) == bytes([0, 0, 0, 3])

    def option(self) -> int:
        """The number of the next option; its data is thrown away."""
        assert int.from_bytes(self.receive(8)) == OPTION_MAGIC
        option = int.from_bytes(self.receive(4))
        self.receive(int.from_bytes(self.receive(4)))
        return option

    def reply(self, option: int, kind: int, payload: bytes = b"") -> None:
        self.send(struct.pack(">QIII", REPLY_MAGIC, option, kind, len(payload)), payload)

    def negotiate(
        self, size: int, contexts: Mapping[int, str] | None = None, blocks: tuple[int, int, int] | None = None
    ) -> None:
        """The whole handshake, as an honest server does it."""
        self.greet()
        while True:
            option = self.option()
            if option == SET_META:
                for number, name in (contexts or {}).items():
                    self.reply(option, META, number.to_bytes(4) + name.encode())
            elif option == GO:
                self.reply(option, INFO, struct.pack(">HQH", 0, size, 3))
                if blocks:
                    self.reply(option, INFO, struct.pack(">HIII", 3, *blocks))
            self.reply(option, ACK)
            if option == GO:
                return

    # Transmission

    def request(self) -> Request:
        magic, flags, command, cookie, offset, length = struct.unpack(">IHHQQI", self.receive(28))
        assert (magic, flags) == (0x25609513, 0)
        return Request(command, cookie, offset, length)

    def chunk(self, cookie: int, kind: int, payload: bytes = b"", flags: int = DONE) -> None:
        self.send(struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, len(payload)), payload)

    def data(self, request: Request, offset: int, payload: bytes, flags: int = DONE) -> None:
        self.chunk(request.cookie, DATA, offset.to_bytes(8) + payload, flags)

    def hole(self, request: Request, offset: int, length: int, flags: int = DONE) -> None:
        self.chunk(request.cookie, HOLE, struct.pack(">QI", offset, length), flags)

    def status(self, request: Request, context: int, *extents: tuple[int, int], flags: int = DONE) -> None:
        payload = context.to_bytes(4) + b"".join(struct.pack(">II", *extent) for extent in extents)
        self.chunk(request.cookie, STATUS, payload, flags)

    def error(
        self, request: Request, number: int, text: str = "", offset: int | None = None, flags: int = DONE
    ) -> None:
        payload = struct.pack(">IH", number, len(text)) + text.encode()
        if offset is None:
            self.chunk(request.cookie, ERROR, payload, flags)
        else:
            self.chunk(request.cookie, ERROR_OFFSET, payload + offset.to_bytes(8), flags)


class ScriptedServer:
    """Runs `script` with the first connection to `address`, in a thread; the connection is closed when it returns.

    Leaving the `with` block waits for the script and raises what went wrong in it. That the client hangs up is an error
    too, unless the script asked for it with `Wire.ended`.
    """

    def __init__(self, script: Callable[[Wire], None]) -> None:
        self._script = script
        self._folder = tempfile.TemporaryDirectory(prefix="nbd-")
        self.address = Address(str(Path(self._folder.name, "s")), "disk")
        self._listener = socket.socket(socket.AF_UNIX)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="scripted NBD server")

    def _serve(self) -> None:
        try:
            connection, _ = self._listener.accept()
            with connection:
                self._script(Wire(connection))
        except BaseException as error:  # noqa: BLE001  # carried to the test's thread, which raises it
            self._error = error

    def __enter__(self) -> Self:
        self._listener.settimeout(LIMIT)
        self._listener.bind(self.address.socket)
        self._listener.listen()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.join(2 * LIMIT)
        self._listener.close()
        self._folder.cleanup()
        if error is None and self._error is not None:
            raise self._error
