"""The server of depot_server.py, which stalls or fails when a test wants it to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from backupcore.model import SourceRef
from backupcore.testing import Target
from tests.testing.depot_server import Handler, Server


class MoodyHandler(Handler):
    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        self.server.goes_on.wait()
        if self.server.failing and self.command == "DELETE":
            self.send_error(507)
            return False
        return True

    def answer(self, status: int, body: bytes = b"", count: int | None = None) -> None:
        self.server.goes_on.wait()
        if self.server.failing and self.command == "PUT":
            Path(self.server.folder + self.path).unlink(missing_ok=True)
            status = 507
        super().answer(status, body, count)


class Moody(Server):
    """A server whose `stall` and `fail` are what a `Target` asks for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, handler=MoodyHandler)
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.failing = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away in the middle is what is tested."""

    @contextmanager
    def stall(self) -> Iterator[None]:
        self.goes_on.clear()
        try:
            yield
        finally:
            self.goes_on.set()

    @contextmanager
    def fail(self) -> Iterator[None]:
        self.failing = True
        try:
            yield
        finally:
            self.failing = False

    def tamper(self, source: SourceRef, artifact: str) -> None:
        path = Path(self.folder, source.token, artifact)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    def target(self, driver: type, **more: Any) -> Target:
        options = {"host": "127.0.0.1", "port": self.server_address[1]}
        return Target(
            driver=driver,
            options=options,
            tamper=self.tamper,
            away={**options, "port": 9},
            stall=self.stall,
            fail=self.fail,
            **{"large": 80 << 20, **more},
        )


@contextmanager
def moody(folder: Path) -> Iterator[Moody]:
    with Moody(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield server
        server.goes_on.set()
        server.shutdown()
        thread.join()
