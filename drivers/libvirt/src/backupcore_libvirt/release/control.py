"""The control socket of a run (`backupcore.guard`): who asks what, and who has the leave to connect to its exports."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from backupcore.errors import BackupError, dump_error, load_error
from backupcore_libvirt.release.admission import Admitted
from backupcore_libvirt.release.loop import Loop
from backupcore_libvirt.release.owner_line import say

__all__ = ["Control"]

_LONGEST = 1 << 16


class Control:
    """Answers on `server`, in the thread of `loop`.

    `status` is what is said of the run, `refusal` why nobody is admitted any more (None as long as somebody is), and
    `give_up` is called with each error because of which somebody wants the run to be given up. Who does waits for the
    next `answer`.
    """

    def __init__(
        self,
        loop: Loop,
        server: socket.socket,
        *,
        status: Callable[[], dict[str, Any]],
        refusal: Callable[[], BackupError | None],
        give_up: Callable[[BackupError], None],
    ) -> None:
        self._loop = loop
        self._server = server
        self._status = status
        self._refusal = refusal
        self._give_up = give_up
        self._waiting: list[socket.socket] = []  # who wants to know what comes of it
        self._admitted: dict[int, Admitted] = {}
        loop.on(server, self._accept)

    def answer(self, what: dict[str, Any]) -> None:
        """Say this to all who wait."""
        for connection in self._waiting:
            _answer(connection, what)
            connection.close()
        self._waiting = []

    def refuse_clients(self) -> list[Admitted]:
        """Those that are admitted, which are the caller's from now on. `refusal` must say why nobody is, any more."""
        clients = list(self._admitted.values())
        self._admitted.clear()
        for client in clients:
            self._loop.off(client)
        return clients

    def _accept(self) -> None:
        with suppress(OSError):
            connection, _ = self._server.accept()
            connection.setblocking(False)
            self._loop.on(connection, partial(self._hear, connection, bytearray()))

    def _hear(self, connection: socket.socket, said: bytearray) -> None:
        try:
            piece = connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        said += piece
        if not said.endswith(b"\n"):
            if not piece or len(said) > _LONGEST:
                self._loop.off(connection)
                connection.close()
            return
        self._loop.off(connection)
        try:
            question = json.loads(said)
            what = question["do"]
        except (ValueError, TypeError, KeyError, RecursionError):
            what = None
        match what:
            case "admit":
                self._admit(connection)
                return
            case "give up":
                self._waiting.append(connection)
                self._give_up(load_error(question))
                return
            case "status":
                _answer(connection, self._status())
            case _:
                _answer(connection, {"error": "a line of JSON with a known 'do' is needed"})
        connection.close()

    def _admit(self, connection: socket.socket) -> None:
        if (why := self._refusal()) is not None:
            _answer(connection, {"admitted": False, **dump_error(why)})
            connection.close()
            return
        try:
            client = Admitted(connection)
        except OSError as error:
            _answer(connection, {"admitted": False, "message": str(error)})
            connection.close()
            return
        self._admitted[connection.fileno()] = client
        say({"said": "admitted", "process": client.process})  # first: should this process die, the owner has to know
        self._loop.on(client, partial(self._hear_client, client))
        _answer(connection, {"admitted": True})

    def _hear_client(self, client: Admitted) -> None:
        """It says nothing more; what comes is its end."""
        try:
            if client.connection.recv(64):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._loop.off(client)
        self._admitted.pop(client.fileno(), None)
        client.close()


def _answer(connection: socket.socket, what: dict[str, Any]) -> None:
    with suppress(OSError):  # it did not wait
        connection.sendall(json.dumps(what).encode() + b"\n")
