"""Who is connected to a unix socket."""

from __future__ import annotations

import time
from pathlib import Path

from backupcore.errors import HypervisorError

__all__ = ["connected", "wait_until_alone"]

_LISTENING = 0x10000  # SO_ACCEPTCON in the Flags column


def connected(socket: Path) -> int:
    """How many connections this socket's server has, accepted or waiting to be.

    By ``/proc/net/unix`` (proc(5)): Num RefCount Protocol Flags Type St Inode Path. The server's end of a connection
    carries the path it was made by; the client's end has none.
    """
    count = 0
    for line in Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7] == str(socket) and not int(fields[3], 16) & _LISTENING:
            count += 1
    return count


def wait_until_alone(socket: Path, limit: float) -> None:
    """Return once nobody is connected. HypervisorError if somebody still is after `limit` seconds."""
    deadline = time.monotonic() + limit
    while count := connected(socket):
        if time.monotonic() > deadline:
            raise HypervisorError(
                f"{count} connection(s) to {socket} are still open; ending the backup job now could hang the guest",
                "End the process that reads from there (a backup of this VM); the next backup then ends the job.",
            )
        time.sleep(0.01)
