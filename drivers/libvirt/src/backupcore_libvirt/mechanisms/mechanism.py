"""What every way of holding a VM's disks does: `Mechanism`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Protocol, Self

from backupcore.model import DiskEstimate
from backupcore_libvirt.look import Look
from backupcore_libvirt.reading.export import Export
from backupcore_libvirt.release.guard import Guard

__all__ = ["Mechanism"]


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
