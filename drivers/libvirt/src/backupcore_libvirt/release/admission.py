"""Who may be connected to a run's exports: the processes that asked for the leave; see `backupcore.disk.nbd.admission`.

Each is held by a pidfd, so that the one that is ended is the one that asked.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import time
from contextlib import suppress

__all__ = ["Admitted"]

_PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid
_SO_PEERPIDFD = 77  # Linux 6.5


class Admitted:
    """One connection of a client, and the process at its other end. `close` lets go of both."""

    def __init__(self, connection: socket.socket) -> None:
        """Raises OSError where that process is gone, and PermissionError where it is another user's."""
        self.connection = connection
        self.process, user, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if user not in (0, os.geteuid()) or self.process <= 0:
            raise PermissionError(f"process {self.process} belongs to another user or namespace")
        self._handle = _handle(connection, self.process)

    def fileno(self) -> int:
        """That of the connection, for a selector."""
        return self.connection.fileno()

    def kill(self) -> None:
        """End the process, whatever it does: it never touches a datastore, so nothing keeps it."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def wait(self, deadline: float) -> bool:
        """Whether the process has ended by then."""
        ended = select.poll()
        ended.register(self._handle, select.POLLIN)
        return bool(ended.poll(max(0, deadline - time.monotonic()) * 1000))

    def revoke(self) -> None:
        """End the leave: the client closes its connection to the export, if it can."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)

    def has_left(self, limit: float) -> bool:
        """Whether the client has closed this connection, within `limit` seconds: it then has no other any more."""
        left = select.poll()
        left.register(self.connection, select.POLLRDHUP)
        return bool(left.poll(limit * 1000))

    def close(self) -> None:
        """Idempotent."""
        self.connection.close()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _handle(connection: socket.socket, process: int) -> int:
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        handle = os.pidfd_open(process)
    # It asked and waits for the answer: while its end is open, the number cannot have gone to another process.
    gone = select.poll()
    gone.register(connection, select.POLLRDHUP)
    if gone.poll(0):
        os.close(handle)
        raise ProcessLookupError(f"process {process} has ended")
    return handle
