"""The leave to connect to an export, asked of the process that guards the run.

QEMU hangs for ever, guest and all, when a backup job is ended beside a client that is half way through the handshake.
So whoever ends it must know who may be connected: each client says so first, keeps that connection as long as the one
to the export, and closes the export's when its leave ends. One line of JSON goes each way: ``{"do": "admit"}``, and
``{"admitted": true}``, or ``{"admitted": false, "message": ...}`` where the run was given up.
"""

from __future__ import annotations

import json
import socket
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from backupcore.disk.nbd.errors import ConnectionLost
from backupcore.disk.unix_socket import connect_to

if TYPE_CHECKING:
    from backupcore.disk.nbd.client import Client

__all__ = ["Leave", "leaves"]

_LONGEST = 65536
_held: set[Leave] = set()


def leaves(path: str) -> int:
    """How many clients of this process have, or ask for, a leave of the guard at `path`."""
    return sum(leave.path == path for leave in list(_held))


class Leave:
    """One leave, from the question to `end`: ConnectionLost where it is not given within `limit` seconds."""

    def __init__(self, path: str, limit: float) -> None:
        self.path = path
        _held.add(self)
        try:
            self._socket = self._asked(limit)
        except BaseException:
            _held.discard(self)
            raise

    def watch(self, client: Client) -> None:
        """Close `client` when the leave ends, from a thread that ends with either."""
        watcher = threading.Thread(target=self._watch, args=(weakref.ref(client),), name="nbd-leave", daemon=True)
        watcher.start()

    def end(self) -> None:
        """The client has let go of its export. Idempotent, from any thread; one that is watched is closed there."""
        with suppress(OSError):  # it has ended
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close one that is not watched."""
        self._socket.close()
        _held.discard(self)

    def _asked(self, limit: float) -> socket.socket:
        try:
            connection = connect_to(Path(self.path), limit)
        except OSError as error:
            raise ConnectionLost(
                f"the process that guards the run does not answer at {self.path}: {error.strerror or error}",
                "Run the backup again.",
            ) from error
        try:
            connection.sendall(b'{"do": "admit"}\n')
            answer = json.loads(_line(connection))
            admitted = answer.get("admitted") is True
            connection.settimeout(None)
        except (OSError, ValueError, AttributeError) as error:
            connection.close()
            raise ConnectionLost(
                f"the process that guards the run has ended ({self.path})", "Run the backup again."
            ) from error
        except BaseException:
            connection.close()
            raise
        if not admitted:
            connection.close()
            raise ConnectionLost(f"the run was given up: {answer.get('message', 'no reason was told')}")
        return connection

    def _watch(self, client: weakref.ref[Client]) -> None:
        try:
            while self._socket.recv(64):
                pass
        except OSError:
            pass  # the client was closed, and its leave with it
        found = client()
        if found is not None:
            found.close()
        self.close()  # last: whoever sees this may take the client for gone


def _line(connection: socket.socket) -> bytes:
    said = bytearray()
    while not said.endswith(b"\n"):
        piece = connection.recv(4096)
        if not piece or len(said) > _LONGEST:
            raise ConnectionResetError("no whole line came")
        said += piece
    return bytes(said)
