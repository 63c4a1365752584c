"""Overlays for the time of one run: no NBD client is ever connected to the VM's QEMU."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Self

from backupcore_libvirt.checkpoint import checkpoint_xml
from backupcore_libvirt.mechanisms.mechanism import ByBitmaps
from backupcore_libvirt.overlay import temporary
from backupcore_libvirt.reading.export import Export
from backupcore_libvirt.release.guard import Guard

__all__ = ["TemporaryOverlays"]


@dataclass(frozen=True, slots=True)
class TemporaryOverlays(ByBitmaps):
    """The overlays of one run of a VM that runs; its increments are told by the bitmaps, as those of a backup job."""

    held: tuple[temporary.Held, ...]

    def narrowed(self, disks: Collection[str]) -> Self:
        """The same for these disks alone, and their overlays."""
        held = tuple(one for one in self.held if one.disk.id in disks)
        return replace(self, look=self.look.narrowed(disks), held=held)

    def ready(self, guard: Guard) -> None:
        """Make the overlays, and begin to track changes.

        The bitmaps are made before the overlays are there: what is written in between is in this backup, and again in
        the next increment.
        """
        guard.hold("guest", room=[one.growing for one in self.held])
        temporary.make(self.domain, self.held, self.folder.scratch, self.look.owner)
        self.mark()
        points = checkpoint_xml(self.checkpoint, self.look.all_disks, self.look.tracked)
        if points is not None:
            self.domain.create_checkpoint(points)

    def begin(self) -> datetime:
        """Put the overlays on the disks."""
        return temporary.begin(self.domain, self.held, self.look.all_disks)

    def serve(self, guard: Guard) -> Mapping[str, Export]:
        """Serve the files below the overlays."""
        found = temporary.serve(self.domain, self.held, self.look.bitmaps, guard, folder=self.folder, ctx=self.ctx)
        return {disk: replace(export, marked=disk in self.bearing) for disk, export in found.items()}
