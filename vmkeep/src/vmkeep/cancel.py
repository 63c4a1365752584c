"""Stopping the backup of a VM from another process.

Only its owner can end a backup: QEMU hangs for ever, guest and all, when a job is aborted beside a half-open NBD
client, and the owner is who reads from it. So it is told to stop, by SIGTERM, and its end is waited for.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from backupcore.errors import AccessDenied, Busy, NotFound
from backupcore.model import VM
from vmkeep import lock, recovery
from vmkeep.catalog import runs
from vmkeep.workplace import Workplace

__all__ = ["Stopped", "cancel"]

LIMIT = 300.0  # seconds: libvirt answers a call that waits for another job after 30, and a job may take 60 to end


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """What was stopped: `doing` says what it was, `state` how it ended (cancelled; recorded, where it was too late).

    `seconds` is how long it took to let go. `did` is what had to be put right, where it was killed meanwhile.
    """

    vm: VM
    process: int
    doing: str
    state: str
    seconds: float
    did: tuple[str, ...] = ()


def cancel(place: Workplace, vm: str, *, waiting: Callable[[lock.Holder], None] = lambda holder: None) -> Stopped:
    """Stop what works on `vm` (a name or a UUID) on this host, and wait until it has let go of the VM.

    NotFound if nothing does. AccessDenied if it belongs to another user. Busy if it has not let go after five minutes.
    libvirt is not asked, unless nothing is found: a backup can be stopped while libvirt hangs.
    """
    holder = lock.holder(place.state, vm)
    if holder is None:
        found = place.hypervisor.find(vm)
        holder = lock.holder(place.state, found.vm.uuid)  # under the name that it had when it began
        if holder is None:
            raise NotFound(f"no backup of VM {found.vm.name} is running", "What runs left behind: vmkeep recover")
    started = time.monotonic()
    _end(holder, waiting)
    seconds = time.monotonic() - started
    last = next(iter(runs.last(place.catalog_if_any, holder.vm.uuid, 1)), None)
    did: tuple[str, ...] = ()
    state = "cancelled"
    if last is not None and last.started.timestamp() >= holder.since.timestamp() - 1:
        state = last.state
    if state == "running":  # it was killed before it could let go
        state = "cancelled"
        did = tuple(line for one in recovery.recover(place, holder.vm.uuid) for line in one.did)
    return Stopped(vm=holder.vm, process=holder.process, doing=holder.doing, state=state, seconds=seconds, did=did)


def _end(holder: lock.Holder, waiting: Callable[[lock.Holder], None]) -> None:
    with suppress(ProcessLookupError):  # it has ended by itself
        handle = os.pidfd_open(holder.process)
        try:
            # From here on the number cannot go to another process unnoticed.
            if not _has_open(holder.process, holder.path):
                return
            waiting(holder)
            signal.pidfd_send_signal(handle, signal.SIGTERM)
            ended = select.poll()
            ended.register(handle, select.POLLIN)
            if not ended.poll(LIMIT * 1000):
                raise Busy(
                    f"process {holder.process} ({holder.doing} of VM {holder.vm.name}) was told to stop and has not "
                    f"ended within {LIMIT:.0f} s",
                    f"It probably waits for libvirt. If it must go: kill -9 {holder.process}, then vmkeep recover "
                    f"{holder.vm.name}",
                )
        except PermissionError as error:
            raise AccessDenied(
                f"process {holder.process} ({holder.doing} of VM {holder.vm.name}) belongs to another user",
                "Cancel it as that user, or as root.",
            ) from error
        finally:
            os.close(handle)


def _has_open(process: int, path: Path) -> bool:
    """Whether a process has this lock file open, as its holder must."""
    wanted = path.stat()
    for entry in Path(f"/proc/{process}/fd").iterdir():
        try:
            found = entry.stat()
        except FileNotFoundError:
            continue  # closed meanwhile
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False
