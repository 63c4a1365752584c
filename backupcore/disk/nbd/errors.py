"""What can go wrong with NBD; the classes say whether the connection is gone."""

from __future__ import annotations

from typing import ClassVar

from backupcore.errors import HypervisorError

__all__ = ["ConnectionLost", "NbdError", "ProtocolError", "RequestFailed", "printable"]


class NbdError(HypervisorError):
    """NBD failed; `connection_lost` says whether the client can still be used."""

    connection_lost: ClassVar[bool] = True


class ConnectionLost(NbdError):
    """There is no connection (any more): the server is away, or `Client.close` was called."""


class ProtocolError(ConnectionLost):
    """The server broke the protocol; the connection was closed."""


class RequestFailed(NbdError):
    """The server answered one request with an error; `errno` is the server's. The connection goes on."""

    connection_lost: ClassVar[bool] = False

    def __init__(self, message: str, hint: str = "", errno: int = 0) -> None:
        super().__init__(message, hint)
        self.errno = errno


def printable(data: bytes) -> str:
    """What a server says of an error, for a message: one line, nothing that moves a terminal's cursor."""
    text = data[:500].decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() else " " for letter in text).strip()
