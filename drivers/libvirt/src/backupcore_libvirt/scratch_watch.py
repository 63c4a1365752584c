"""Watching scratch while a backup job runs: QEMU 7.2 stops the guest when a scratch file cannot grow.

So the run is given up before the scratch file system is full (`folder.reserve`), and at once where QEMU has stopped
the guest all the same; `postbackup` then ends the job, which lets the guest go on.
"""

from __future__ import annotations

import time
from contextlib import ExitStack

from backupcore.errors import BackupError, HypervisorError, NotFound, TargetFull
from backupcore_libvirt.connection import IO_ERROR, OFF, PAUSED, Connection, Domain
from backupcore_libvirt.libvirt_errors import is_away
from backupcore_libvirt.scratch import scratch_room
from backupcore_libvirt.watch import Watch

__all__ = ["ScratchWatch"]

FREE_EVERY = 0.1  # seconds; a guest that overwrites 2 GB/s takes 200 MiB of the reserve in one interval
STATE_EVERY = 0.5


class ScratchWatch(Watch):
    """One thread per run."""

    def run(self) -> None:
        """Look until asked to stop, or until there is something to fail for."""
        try:
            with ExitStack() as stack:
                self._look(stack)
        except NotFound:
            self.ctx.fail(self._ended())
        except (BackupError, OSError) as error:
            if not self.stop_asked.is_set():
                self.ctx.fail(
                    error
                    if isinstance(error, BackupError)
                    else HypervisorError(f"scratch folder {self.folder.scratch} cannot be watched: {error}")
                )

    def _look(self, stack: ExitStack) -> None:
        state_due = time.monotonic()
        domain: Domain | None = None
        away = False
        while not self.stop_asked.wait(FREE_EVERY):
            free, kept = scratch_room(self.folder.scratch)
            if free <= kept:
                self._fail(f"{free >> 20} MiB are left of the reserve of {kept >> 20} MiB")
                return
            if time.monotonic() < state_due:
                continue
            try:
                if domain is None:
                    domain = stack.enter_context(Connection(self.uri)).domain(self.vm_uuid)
                state = domain.state()
            except HypervisorError as error:
                if not is_away(error):
                    raise
                # The export is QEMU's, and goes on while libvirtd is started anew; scratch is watched all the same.
                if not away:
                    self.ctx.log.warning("VM %s: %s; the backup goes on meanwhile", self.vm_name, error)
                domain, away = None, True
                stack.close()
            else:
                away = False
                if state[0] in OFF:
                    self.ctx.fail(self._ended())
                    return
                if state == (PAUSED, IO_ERROR):
                    self._fail("QEMU has stopped the guest after an I/O error; ending the backup lets it go on")
                    return
            state_due = time.monotonic() + STATE_EVERY

    def _ended(self) -> HypervisorError:
        return HypervisorError(
            f"VM {self.vm_name} ended while its backup ran; its disks cannot be read any further",
            "Start the VM, then run it again.",
        )

    def _fail(self, why: str) -> None:
        self.ctx.fail(
            TargetFull(
                f"scratch folder {self.folder.scratch} is full: {why}; the backup of VM {self.vm_name} was given up so "
                "that the guest can go on",
                "Make room there, or set 'scratch' to a larger file system: it must hold what the guest overwrites "
                "during a backup.",
            )
        )
