"""Overlays that stay between backups and collect what changes: INCREMENT_MODE=SNAPSHOT."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Self

from backupcore.context import Context
from backupcore.model import BackupRun, DiskEstimate
from backupcore_libvirt.connection import Domain
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.look import Look
from backupcore_libvirt.overlay import run as overlay_run
from backupcore_libvirt.overlay.plan import Plan
from backupcore_libvirt.reading.export import Export
from backupcore_libvirt.release.guard import Guard

__all__ = ["Overlays"]


@dataclass(frozen=True, slots=True)
class Overlays:
    """The overlays of one run, as `plan` has them."""

    domain: Domain
    run: BackupRun
    folder: RunFolder
    ctx: Context
    look: Look
    plan: Plan

    def narrowed(self, disks: Collection[str]) -> Self:
        """The same for these disks alone."""
        parts = tuple(part for part in self.plan.parts if part.disk.id in disks)
        return replace(self, look=self.look.narrowed(disks), plan=Plan(parts))

    def estimate(self) -> tuple[DiskEstimate, ...]:
        """By the room that the files need."""
        return self.plan.estimate()

    def ready(self, guard: Guard) -> None:
        """Remove what would hinder overlays, the checkpoints of changed block tracking, and make the overlays."""
        if self.look.live:
            guard.hold("guest", room=overlay_run.growing(self.run, self.plan, self._sizes))
        else:
            guard.hold()
        overlay_run.clear(self.domain, self.run.installation, live=self.look.live)
        overlay_run.make(self.run, self.plan, self._sizes)

    def begin(self) -> datetime:
        """Put a new overlay on all disks."""
        return overlay_run.begin(
            self.domain, self.run, self.plan, self.look.all_disks, self._sizes, live=self.look.live
        )

    def serve(self, guard: Guard) -> Mapping[str, Export]:
        """Serve the files below the new overlays."""
        return overlay_run.serve(self.domain, self.run, self.plan, guard, folder=self.folder, ctx=self.ctx)

    @property
    def _sizes(self) -> Mapping[str, int]:
        return {disk.id: self.look.nodes[disk.id].virtual_size for disk in self.look.disks}
