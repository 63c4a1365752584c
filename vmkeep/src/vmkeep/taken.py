"""What a backup ends with, for whoever has asked for it."""

from __future__ import annotations

from dataclasses import dataclass

from backupcore.session import Recorded
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
