"""Overlays for the time of one run: no NBD client is ever connected to the VM's QEMU."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Self

from backupcore.context import Context
from backupcore.model import BackupRun, DiskEstimate
from backupcore_libvirt.checkpoint import checkpoint_xml
from backupcore_libvirt.connection import Connection, Domain
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.look import Look
from backupcore_libvirt.overlay import temporary
from backupcore_libvirt.reading.export import Export
from backupcore_libvirt.reading.taken import estimate_of
from backupcore_libvirt.release.guard import Guard

__all__ = ["TemporaryOverlays"]


@dataclass(frozen=True, slots=True)
class TemporaryOverlays:
    """The overlays of one run of a VM that runs; its increments are told by the bitmaps, as those of a backup job."""

    connection: Connection
    domain: Domain
    run: BackupRun
    folder: RunFolder
    ctx: Context
    look: Look
    held: tuple[temporary.Held, ...]

    def narrowed(self, disks: Collection[str]) -> Self:
        """The same for these disks alone."""
        held = tuple(one for one in self.held if one.disk.id in disks)
        return replace(self, look=self.look.narrowed(disks), held=held)

    def estimate(self) -> tuple[DiskEstimate, ...]:
        """By the bitmaps, or by what the disks need on the host."""
        return tuple(estimate_of(self.domain, disk, self.look) for disk in self.look.disks)

    def ready(self, guard: Guard) -> None:
        """Make the overlays, and begin to track changes.

        The bitmaps are made before the overlays are there: what is written in between is in this backup, and again in
        the next increment.
        """
        guard.hold("guest", room=[one.growing for one in self.held])
        temporary.make(self.domain, self.held)
        points = checkpoint_xml(self.run.point, self.look.all_disks, self.look.tracked)
        if points is not None:
            self.domain.create_checkpoint(points)

    def begin(self) -> datetime:
        """Put the overlays on the disks."""
        return temporary.begin(self.domain, self.held, self.look.all_disks)

    def serve(self, guard: Guard) -> Mapping[str, Export]:
        """Serve the files below the overlays."""
        return temporary.serve(self.domain, self.held, self.look.bitmaps, guard, folder=self.folder, ctx=self.ctx)
