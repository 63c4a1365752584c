"""`qemu-nbd` on the disks of a VM that is off."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Self

from backupcore.context import Context
from backupcore.model import BackupRun, DiskEstimate
from backupcore_libvirt.checkpoint import checkpoint_name
from backupcore_libvirt.connection import Connection, Domain
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.look import Look
from backupcore_libvirt.qemu_nbd import QemuNbd
from backupcore_libvirt.reading.export import Export
from backupcore_libvirt.reading.taken import estimate_of
from backupcore_libvirt.release.guard import Guard
from backupcore_libvirt.stopped import add_bitmaps

__all__ = ["OffNbd"]


@dataclass(frozen=True, slots=True)
class OffNbd:
    """The servers of one run: one per disk. They live until the end of the run's context, or `end_stray`.

    From the first server on QEMU's lock keeps the VM off, so all disks show one instant; where one is a block device
    the run is given up if the VM starts.
    """

    connection: Connection
    domain: Domain
    run: BackupRun
    folder: RunFolder
    ctx: Context
    look: Look

    def narrowed(self, disks: Collection[str]) -> Self:
        """The same for these disks alone."""
        return replace(self, look=self.look.narrowed(disks))

    def estimate(self) -> tuple[DiskEstimate, ...]:
        """By the bitmaps, or by what the disks need on the host."""
        return tuple(estimate_of(self.domain, disk, self.look) for disk in self.look.disks)

    def ready(self, guard: Guard) -> None:
        """Watch for a start of the VM, where no lock prevents it."""
        guard.hold(*(["start"] if any(disk.kind == "block" for disk in self.look.disks) else []))

    def begin(self) -> datetime:
        """Begin to track changes.

        The bitmaps come before the servers, since a served image cannot be written to; what is written in between is in
        the export and again in the next increment.
        """
        tracked = [disk for disk in self.look.disks if disk.id in self.look.tracked]
        add_bitmaps(tracked, checkpoint_name(self.run.point))
        return datetime.now(UTC)

    def serve(self, _guard: Guard) -> Mapping[str, Export]:
        """Start the servers. Busy where the VM has been started meanwhile."""
        exports = {}
        for disk in self.look.disks:
            self.ctx.check()
            bitmap = self.look.bitmaps.get(disk.id)
            socket = self.folder.socket_of(disk.id)
            server = QemuNbd(socket, disk.path, disk.format, bitmaps=[bitmap] if bitmap else [])
            self.ctx.stack.enter_context(server)
            exports[disk.id] = Export(server.address, bitmap)
        return exports
