"""What every way of holding a VM's disks does (`Mechanism`), and what those share whose increments bitmaps tell."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Protocol, Self

from backupcore.context import Context
from backupcore.model import BackupRun, DiskEstimate
from backupcore_libvirt.checkpoint import checkpoint_name, mark_name
from backupcore_libvirt.connection import Connection, Domain
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.look import Look
from backupcore_libvirt.marks import add
from backupcore_libvirt.reading.export import Export
from backupcore_libvirt.reading.taken import estimate_of
from backupcore_libvirt.release.guard import Guard

__all__ = ["ByBitmaps", "Mechanism"]


class Mechanism(Protocol):
    """One way of holding one instant of a VM's disks, chosen for one run. The calls come in the order written here.

    What it holds is let go of by looking at what is there, also in another process: see `choice.settle`.
    """

    @property
    def look(self) -> Look:
        """What was found of the VM, and which disks are taken how."""

    def narrowed(self, disks: Collection[str]) -> Self:
        """The same for these disks alone, by ID."""

    def estimate(self) -> tuple[DiskEstimate, ...]:
        """What would be taken of each disk, about. Touches nothing; no other call follows."""

    def ready(self, guard: Guard) -> None:
        """Tell the guard what to look for, and do all that may take time or fail before the instant.

        The run's folder is there, and the guest still runs.

        IncrementImpossible, Busy, HypervisorError.
        """

    def begin(self) -> datetime:
        """The one call that fixes the instant of all disks, which is returned (UTC). The guest may stand still for it.

        IncrementImpossible, Busy, HypervisorError.
        """

    def serve(self, guard: Guard) -> Mapping[str, Export]:
        """Where each disk can be read, by its ID. The exports live until the release of the run.

        An export that must not end beside a client of which nobody knows is read with the guard's leave.
        """


@dataclass(frozen=True, slots=True)
class ByBitmaps:
    """One run of a VM whose increments are told by QEMU's bitmaps."""

    connection: Connection
    domain: Domain
    run: BackupRun
    folder: RunFolder
    ctx: Context
    look: Look
    bearing: set[str] = field(default_factory=set, kw_only=True)
    """The disks that bear the mark of this run's point."""

    @property
    def checkpoint(self) -> str:
        """The name of the checkpoint, and of the bitmaps, that tell what changes after this run."""
        return checkpoint_name(self.run.point, self.run.installation)

    @property
    def marks(self) -> Mapping[str, str]:
        """The mark that each tracked disk gets."""
        return {disk: mark_name(self.checkpoint, disk) for disk in self.look.tracked}

    def mark(self) -> None:
        """Put the marks on the disks of a running VM, before anything tracks what changes."""
        self.bearing.update(add(self.domain, self.marks, self.look.nodes, self.folder))

    def narrowed(self, disks: Collection[str]) -> Self:
        """The same for these disks alone."""
        return replace(self, look=self.look.narrowed(disks))

    def estimate(self) -> tuple[DiskEstimate, ...]:
        """By the bitmaps, or by what the disks need on the host."""
        return tuple(estimate_of(self.domain, disk, self.look) for disk in self.look.disks)
