"""A server behind one that counts: every byte between a client and an S3 server, both ways."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

__all__ = ["Counted"]

_PIECE = 1 << 18


class Counted:
    """Within the ``with`` block `url` leads to the server on that port of the loopback.

    `sent` are the bytes from its clients to it, `received` those that it answered.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._lock = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.sent = self.received = 0
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # accept would go on waiting on a socket that is only closed
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._port))
            for source, target, sending in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._pass, args=(source, target, sending), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, sending: bool) -> None:
        with suppress(OSError):
            while piece := source.recv(_PIECE):
                target.sendall(piece)
                with self._lock:
                    if sending:
                        self.sent += len(piece)
                    else:
                        self.received += len(piece)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)
