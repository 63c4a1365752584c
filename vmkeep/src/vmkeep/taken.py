"""What a backup ends with, for whoever has asked for it."""

from __future__ import annotations

from dataclasses import dataclass

from backupcore.session import Recorded
from backupcore.typed import typed
from vmkeep import retention

__all__ = ["Taken"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A backup that was taken and recorded; `image` is its image's number.

    `retention` is what was let go for it, `warnings` what went wrong after the record.
    """

    recorded: Recorded
    image: int
    retention: tuple[retention.Action, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def missed(self) -> tuple[str, ...]:
        """A line for each disk with data of the guest that no backup holds, and that nobody chose to leave out."""
        left = [one for one in self.recorded.left_out if one.missed]
        run = self.recorded.run
        excluded = [name for name in run.settings.get("EXCLUDE_DISKS", "").split(",") if name]
        chosen = ",".join([*excluded, *(one.id for one in left)])
        hint = f"If that is meant: {typed('vmkeep vm updateconf', run.vm.name, '--exclude-disks', chosen)}"
        return tuple(f"disk {one.id} is not in it: {one.reason}. {hint}" for one in left)
