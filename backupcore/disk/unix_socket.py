"""Unix sockets whose path may be longer than the 107 bytes of ``sockaddr_un``: by way of their folder's descriptor."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["connect_to", "listen_at"]


def connect_to(path: Path, limit: float) -> socket.socket:
    """A connection to the server at `path`, within `limit` seconds; that is its timeout, too. OSError."""
    deadline = time.monotonic() + limit
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short(path) as name:
            while True:
                connection.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    connection.connect(name)
                except BlockingIOError:
                    # A full backlog: a unix socket with a timeout does not wait for a place by itself.
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.02)
                else:
                    return connection
    except BaseException:
        connection.close()
        raise


def listen_at(path: Path) -> socket.socket:
    """A server at `path`, for its user alone; one that an earlier process has left there is replaced. OSError."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        with _short(path) as name:
            server.bind(name)
        path.chmod(0o600)
        server.listen(64)
    except BaseException:
        server.close()
        raise
    return server


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
