"""Giving a run up: the order in which that is done.

1. The run is marked, so that it can never be recorded or adopted. That is bounded in time: a state folder that hangs or
   is full must not keep the guest standing.
2. Every process that may be connected to the guest's disks is ended: QEMU hangs for ever if a job is ended beside a
   client that is half way through its handshake. They never touch the datastore, so they die at once. The owner, which
   may hang in a write to it, closes its own connections; only one that does not is killed for them.
3. The servers and the job are ended, once ``/proc/net/unix`` shows nobody connected, and the guest goes on.

What the datastore still owes comes later, and is the owner's affair, or the next run's.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from backupcore import verdict
from backupcore.errors import BackupError
from backupcore.thread import aside
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.mechanisms.letting_go import let_go
from backupcore_libvirt.release.admission import Admitted

__all__ = ["Run", "end_clients", "give_up", "is_marked", "mark"]

MARK_LIMIT = 2.0
OWNER_LIMIT = 3.0  # seconds for an owner that reads by itself to close its connections
DEATH_LIMIT = 2.0


@dataclass(frozen=True, slots=True)
class Run:
    """What has to be known of a run for that; `folder` is its private one, `owner` the number of its process.

    `installation` is whose run it is.
    """

    uri: str
    vm: str
    name: str
    scratch: RunFolder
    folder: Path
    owner: int
    installation: str = ""


def give_up(run: Run, error: BackupError | None, clients: Sequence[Admitted], reader: int | None) -> list[str]:
    """Do all of it, as far as it is not done; what was done, a line each. With `error` None the run is not marked.

    `reader` is the pidfd of the process that was forked to read, whether it has a leave just now or not.

    HypervisorError where the guest is not let go of yet: may be called again.
    """
    if error is not None:
        mark(run.folder, error)
    end_clients(clients, run.owner, reader)
    return let_go(run.uri, run.vm, run.scratch)


def mark(folder: Path, error: BackupError) -> None:
    """Say on disk that the run comes to nothing, within `MARK_LIMIT`; where that takes longer, it is tried on."""

    def write() -> None:
        with suppress(OSError):  # nor can the owner claim the run there, or record it
            verdict.give_up(folder, error)

    writer = aside(write, "mark")
    if writer is not None:
        writer.join(MARK_LIMIT)


def is_marked(folder: Path) -> bool:
    """Whether the run was given up for good, as far as its folder tells within `MARK_LIMIT`."""
    found: list[bool] = []

    def look() -> None:
        with suppress(OSError):
            found.append(verdict.given_up(folder) is not None)

    looking = aside(look, "verdict")
    if looking is not None:
        looking.join(MARK_LIMIT)
    return found == [True]


def end_clients(clients: Sequence[Admitted], owner: int, reader: int | None) -> None:
    """End the leave of all, and the processes of all but the owner; that one too, if it stays connected."""
    if reader is not None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(reader, signal.SIGKILL)
    for client in clients:
        client.revoke()
    others = [client for client in clients if client.process != owner]
    for client in others:
        client.kill()
    deadline = time.monotonic() + DEATH_LIMIT
    for client in others:
        client.wait(deadline)
    for client in clients:
        if client.process == owner and not client.has_left(OWNER_LIMIT):
            client.kill()
            client.wait(time.monotonic() + DEATH_LIMIT)
