"""What a backup ends with, for whoever has asked for it."""

from __future__ import annotations

from dataclasses import dataclass

from backupcore.session import Recorded
from backupcore.typed import typed
from vmkeep import retention

__all__ = ["Taken"]

PARTS = ("nvram", "tpm", "kernel", "initrd", "dtb")
"""What may be left out of a VM and is no disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A backup that was taken and recorded; `image` is its image's number.

    `found` is what the datastore no longer holds, or holds besides what the catalog knows; `retention` what was let go
    for it, `warnings` what went wrong after the record.
    """

    recorded: Recorded
    image: int
    retention: tuple[retention.Action, ...] = ()
    warnings: tuple[str, ...] = ()
    found: tuple[str, ...] = ()

    @property
    def missed(self) -> tuple[str, ...]:
        """A line for each part of the VM that ought to be in it and is not: a disk that nobody left out, say."""
        missed = [one for one in self.recorded.left_out if one.missed]
        disks = [one for one in missed if one.id not in PARTS]
        run = self.recorded.run
        excluded = [name for name in run.settings.get("EXCLUDE_DISKS", "").split(",") if name]
        chosen = ",".join([*excluded, *(one.id for one in disks)])
        hint = f"If that is meant: {typed('vmkeep vm updateconf', run.vm.name, '--exclude-disks', chosen)}"
        lines = [f"{one.id} is not in it: {one.reason}" for one in missed if one.id in PARTS]
        return (*(f"disk {one.id} is not in it: {one.reason}. {hint}" for one in disks), *lines)
