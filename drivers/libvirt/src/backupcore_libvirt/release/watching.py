"""What makes the guard give a run up: scratch that fills up, a guest that was stopped or has ended, a VM that starts.

- QEMU 7.2 stops the guest when a scratch file cannot grow. So a run is given up before the scratch file system is full
  (`scratch.reserve`), and at once where QEMU has stopped the guest all the same.
- A file that is read keeps a VM that is off from starting, by QEMU's lock on it, and whoever else from merging an
  overlay on it. A device does not: libvirt gives each VM device nodes of its own, and locks are a node's; nor does a
  file system without locks. What is then written would tear the backup.
- What is written without QEMU, which no lock prevents, the file itself tells.

Each look has a thread of its own, since libvirt, or a file system, may not answer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from backupcore.errors import BackupError, Busy, HypervisorError, NotFound, TargetFull, from_os_error
from backupcore_libvirt.connection import ACTIVE_COMMIT, COMMIT, IO_ERROR, OFF, PAUSED, Connection, Domain
from backupcore_libvirt.disks import located, source_disks
from backupcore_libvirt.libvirt_errors import is_away
from backupcore_libvirt.overlay.room import Growing, too_full
from backupcore_libvirt.reading.still import Stamps, require_still, require_unwritten
from backupcore_libvirt.release.giving_up import Run
from backupcore_libvirt.scratch import scratch_room

__all__ = ["WATCHES", "Devices", "Merges", "Room", "Watch", "Writes", "vm_ended"]

FREE_EVERY = 0.1  # seconds; a guest that overwrites 2 GB/s takes 200 MiB of the reserve in one interval
STATE_EVERY = 0.5
WRITES_EVERY = 0.2
DEVICES_EVERY = 2.0  # each looks at all that all processes have open
START_EVERY = 0.1  # a VM is active for libvirt from before its QEMU runs, and its firmware takes longer than that


def vm_ended(name: str) -> HypervisorError:
    """The error of a run whose VM of this name has ended, and with it what QEMU served of its disks."""
    return HypervisorError(
        f"VM {name} ended while its backup ran; its disks cannot be read any further",
        "Run the backup again: it takes the VM running or off.",
    )


class Watch(threading.Thread):
    """One look, repeated until `stop_asked` is set, or there is something to give the run up for: `trouble` is told.

    `remark` is told what the user should know, and what is no trouble.
    """

    def __init__(self, run: Run, trouble: Callable[[BackupError], None], remark: Callable[[str], None]) -> None:
        super().__init__(name=type(self).__name__, daemon=True)
        self._run = run
        self._trouble = trouble
        self._remark = remark
        self.stop_asked = threading.Event()

    def run(self) -> None:
        """Look."""
        try:
            error = self._look()
        except OSError as problem:
            error = HypervisorError(f"scratch folder {self._run.scratch.scratch} cannot be watched: {problem}")
        except BackupError as problem:
            error = problem
        except Exception as problem:  # noqa: BLE001 - whatever it is: nobody would look any more
            error = HypervisorError(
                f"VM {self._run.name} cannot be watched any more: {type(problem).__name__}: {problem}", "Run it again."
            )
        if error is not None and not self.stop_asked.is_set():
            self._trouble(error)

    def _look(self) -> BackupError | None:
        """What the run is to be given up for; None when it was told to stop."""
        raise NotImplementedError

    def _full(self, why: str) -> TargetFull:
        return TargetFull(
            f"scratch folder {self._run.scratch.scratch} is full: {why}; the backup of VM {self._run.name} was given "
            "up so that the guest can go on",
            "Make room there, or set 'scratch' to a larger file system: it must hold what the guest overwrites "
            "during a backup.",
        )


class _Scratch(Watch):
    """The room in scratch."""

    def _look(self) -> BackupError | None:
        while not self.stop_asked.wait(FREE_EVERY):
            free, kept = scratch_room(self._run.scratch.scratch)
            if free <= kept:
                return self._full(f"{free >> 20} MiB are left of the reserve of {kept >> 20} MiB")
        return None


class Room(Watch):
    """The room for the overlays that a VM writes to meanwhile; `growing` are these."""

    def __init__(
        self,
        run: Run,
        trouble: Callable[[BackupError], None],
        remark: Callable[[str], None],
        growing: Sequence[Growing],
    ) -> None:
        super().__init__(run, trouble, remark)
        self._growing = growing

    def _look(self) -> BackupError | None:
        while not self.stop_asked.wait(FREE_EVERY):
            if why := too_full(self._growing):
                return TargetFull(
                    f"VM {self._run.name}: the file system of its overlays is full: {why}; the backup was given up so "
                    "that the guest can go on",
                    "Make room there: it must hold what the guest writes during a backup, twice where the files of its "
                    "disks are sparse.",
                )
        return None


class _Asking(Watch):
    """One that asks libvirt, which may be started anew meanwhile."""

    every: float

    def _look(self) -> BackupError | None:
        domain: Domain | None = None
        away = False
        with ExitStack() as stack:
            while not self.stop_asked.wait(self.every):
                try:
                    if domain is None:
                        domain = stack.enter_context(Connection(self._run.uri)).domain(self._run.vm)
                    error = self._ask(domain)
                except NotFound:
                    return self._gone()
                except HypervisorError as problem:
                    if not is_away(problem):
                        raise
                    # What is read is served by QEMU, and goes on meanwhile.
                    if not away:
                        self._remark(f"VM {self._run.name}: {problem}; the backup goes on meanwhile")
                    domain, away = None, True
                    stack.close()
                else:
                    away = False
                    if error is not None:
                        return error
        return None

    def _ask(self, domain: Domain) -> BackupError | None:
        raise NotImplementedError

    def _gone(self) -> BackupError | None:
        """What it means that libvirt does not know the VM any more."""
        raise NotImplementedError


class _State(_Asking):
    """Whether the guest of a backup job still runs."""

    every = STATE_EVERY

    def _ask(self, domain: Domain) -> BackupError | None:
        state = domain.state()
        if state[0] in OFF:
            return self._gone()
        if state == (PAUSED, IO_ERROR):
            return self._full("QEMU has stopped the guest after an I/O error; ending the backup lets it go on")
        return None

    def _gone(self) -> BackupError:
        return vm_ended(self._run.name)


class _Life(_State):
    """Whether the VM of a backup job is still there, where QEMU had stopped its guest before."""

    def _ask(self, domain: Domain) -> BackupError | None:
        return self._gone() if domain.state()[0] in OFF else None


class _Guest(_Asking):
    """Whether a guest that writes to overlays goes on. Its disks are read without it: it may end."""

    every = STATE_EVERY

    def _ask(self, domain: Domain) -> BackupError | None:
        if domain.state() != (PAUSED, IO_ERROR):
            return None
        return TargetFull(
            f"VM {self._run.name}: QEMU has stopped the guest after an I/O error; the backup was given up so that it "
            "can go on",
            "Is the file system of its disks full, or scratch? What the guest writes during a backup needs room there.",
        )

    def _gone(self) -> BackupError:
        return NotFound(f"VM {self._run.name} was undefined, or has ended for good, while its backup ran")


class _Start(_Asking):
    """Whether a VM that is off stays off."""

    every = START_EVERY

    def _ask(self, domain: Domain) -> BackupError | None:
        if not domain.is_active():
            return None
        return Busy(
            f"VM {self._run.name} was started while its disks were read; on block devices, and on file systems without "
            "locks, that is not prevented",
            "Run it again: the VM is then backed up while it runs.",
        )

    def _gone(self) -> None:
        """It was undefined: nobody starts it."""


class Writes(Watch):
    """Whether the files that are read stay unwritten, since `before`, and those of `there` stay where they are."""

    def __init__(
        self,
        run: Run,
        trouble: Callable[[BackupError], None],
        remark: Callable[[str], None],
        before: Stamps,
        there: Sequence[str],
    ) -> None:
        super().__init__(run, trouble, remark)
        self._before = before
        self._there = there

    def _look(self) -> BackupError | None:
        while not self.stop_asked.wait(WRITES_EVERY):
            try:
                require_still(self._run.name, self._before, self._there)
            except OSError as error:
                return from_os_error(error, f"the disks of VM {self._run.name}, which are read")
        return None


class Devices(Watch):
    """Whether the block devices that a VM is on stay unwritten while it is off; `devices` are their paths."""

    def __init__(
        self,
        run: Run,
        trouble: Callable[[BackupError], None],
        remark: Callable[[str], None],
        devices: Sequence[str],
    ) -> None:
        super().__init__(run, trouble, remark)
        self._devices = devices

    def _look(self) -> BackupError | None:
        while not self.stop_asked.wait(DEVICES_EVERY):
            require_unwritten(self._run.name, self._devices)
        return None


class Merges(_Asking):
    """Whether what lies below overlays without a lock stays as it is, once the VM uses these (`growing`). libvirt is
    not kept from a merge of somebody else's, nor from a start of the VM on what lies below.
    """

    every = START_EVERY

    def __init__(
        self,
        run: Run,
        trouble: Callable[[BackupError], None],
        remark: Callable[[str], None],
        growing: Sequence[Growing],
    ) -> None:
        super().__init__(run, trouble, remark)
        self._overlays = {disk.disk: disk for disk in growing}

    def _ask(self, domain: Domain) -> BackupError | None:
        if not self._overlays or not domain.is_active():
            return None
        now = {disk.id: located(domain, disk).path for disk in source_disks(domain.live_xml())}
        for disk, held in self._overlays.items():
            if now.get(disk) == held.below or self._is_merged(domain, disk):
                return Busy(
                    f"VM {self._run.name}: disk {disk} was merged, or the VM was started without its overlay, while a "
                    f"backup read {held.below}; on block devices and file systems without locks that is not prevented",
                    "Leave its overlays alone while it is backed up (virsh blockcommit), and run the backup again.",
                )
        return None

    def _is_merged(self, domain: Domain, disk: str) -> bool:
        try:
            return domain.block_job_progress(disk)[0] in (COMMIT, ACTIVE_COMMIT)
        except HypervisorError as error:
            if is_away(error):
                raise
            return False  # the VM has just ended, or the disk was detached

    def _gone(self) -> None:
        """It was undefined: nobody starts it. `_Guest` tells that."""


WATCHES: dict[str, type[Watch]] = {
    "scratch": _Scratch,
    "state": _State,
    "life": _Life,
    "start": _Start,
    "guest": _Guest,
}
"""What can be asked for, by name."""
