"""Parts that several documents have."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backupcore.model import Increment, LeftOut
    from vmkeep.retention import Action

__all__ = ["Document", "action", "disks", "left_out"]

Document = dict[str, object]


def disks(increment: Increment) -> list[Document]:
    """The disks of an increment."""
    return [
        {"id": disk.id, "size": disk.virtual_size, "whole": disk.whole, "reason": disk.reason}
        for disk in increment.disks
    ]


def left_out(left: tuple[LeftOut, ...]) -> list[Document]:
    """What a backup does not hold."""
    return [{"id": one.id, "reason": one.reason} for one in left]


def action(done: Action) -> Document:
    """What retention does, or would do."""
    return {
        "action": done.what,
        "image": done.image,
        "to": done.to,
        "why": done.why,
        "done": done.done,
        "error": done.error or None,
    }
