"""Watching that a VM which is off stays off while its block devices are read.

A file that is read keeps its VM from starting, by QEMU's lock on it. A device does not: libvirt gives each VM device
nodes of its own, and locks are a node's. What the guest then writes would tear the backup, so the run is given up.
"""

from __future__ import annotations

from contextlib import ExitStack

from backupcore.errors import Busy, HypervisorError, NotFound
from backupcore_libvirt.connection import Connection, Domain
from backupcore_libvirt.libvirt_errors import is_away
from backupcore_libvirt.watch import Watch

__all__ = ["StartWatch"]

EVERY = 0.1  # seconds; a VM is active for libvirt from before its QEMU runs, and its firmware takes longer than that


class StartWatch(Watch):
    """One thread per run."""

    def run(self) -> None:
        """Look until asked to stop, or until the VM has been started."""
        domain: Domain | None = None
        with ExitStack() as stack:
            while not self.stop_asked.wait(EVERY):
                try:
                    if domain is None:
                        domain = stack.enter_context(Connection(self.uri)).domain(self.vm_uuid)
                    if domain.is_active():
                        self._fail()
                        return
                except NotFound:
                    return  # it was undefined: nobody starts it
                except HypervisorError as error:
                    if not is_away(error):
                        self.ctx.fail(error)
                        return
                    domain = None  # while libvirtd is away nobody starts a VM
                    stack.close()

    def _fail(self) -> None:
        self.ctx.fail(
            Busy(
                f"VM {self.vm_name} was started while its disks were read; of block devices that is not prevented",
                "Run it again: the VM is then backed up while it runs.",
            )
        )
