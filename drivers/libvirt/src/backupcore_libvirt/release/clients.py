"""Who is connected to a unix socket."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from backupcore.errors import HypervisorError

__all__ = ["connected", "wait_until_alone"]

# Each shows the sockets of one network namespace: this process's, and the host's, in which QEMU runs where this process
# has been given one of its own (PrivateNetwork=yes). /proc/net is not there with ProcSubset=pid.
_TABLES = (Path("/proc/self/net/unix"), Path("/proc/1/net/unix"))
_LISTENING = 0x10000  # SO_ACCEPTCON in the Flags column


def connected(socket: Path) -> int:
    """How many connections this socket's server has, accepted or waiting to be.

    By ``/proc/PID/net/unix`` (proc(5)): Num RefCount Protocol Flags Type St Inode Path. The server's end of a
    connection carries the path it was made by; the client's end has none. HypervisorError where that cannot be seen.
    """
    counts = []
    for table in _TABLES:
        with suppress(OSError):
            counts.append(_counted(table.read_text(errors="surrogateescape"), str(socket)))
    if not counts:
        raise HypervisorError(
            f"it cannot be seen who is connected to {socket}: {_TABLES[0]} is not there", "Is /proc mounted?"
        )
    return max(counts)


def _counted(table: str, socket: str) -> int:
    count = 0
    for line in table.splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7] == socket and not int(fields[3], 16) & _LISTENING:
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
