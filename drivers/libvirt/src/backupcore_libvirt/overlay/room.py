"""The room beside a VM's disks while it writes to overlays: what a run needs, and whether there is still enough."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from backupcore.errors import TargetFull, from_os_error
from backupcore_libvirt.scratch import reserve

__all__ = ["Growing", "require_room", "too_full"]


@dataclass(frozen=True, slots=True)
class Growing:
    """A disk whose new blocks go to `overlay` for now, and back into `below` by a merge.

    `spread` is how many bytes `below` may grow by then: what it does not have on its file system yet.
    """

    disk: str
    overlay: str
    below: str
    spread: int

    @classmethod
    def of(cls, disk: str, overlay: str, below: str, size: int) -> Growing:
        """`size` is what the guest sees, in bytes."""
        try:
            held = Path(below).stat().st_blocks * 512
        except OSError as error:
            raise from_os_error(error, f"disk {disk}: {below}") from error
        return cls(disk, overlay, below, max(0, size - held))


def require_room(vm: str, growing: Iterable[Growing], losing: Mapping[str, int]) -> None:
    """TargetFull unless twice the reserve is free beside every disk.

    `losing` are disks on which QEMU does not stop a guest whose write fails, and their sizes: for these there must be
    room for all that can be written to them.
    """
    for disk in growing:
        folder = Path(disk.below).parent
        free, kept = _room(folder)
        needed = losing[disk.disk] + kept + min(losing[disk.disk], disk.spread) if disk.disk in losing else 2 * kept
        if free < needed:
            why = (
                "its error_policy makes the guest lose what it writes when the file system is full"
                if disk.disk in losing
                else "what the guest writes during a backup goes to an overlay there"
            )
            raise TargetFull(
                f"VM {vm}, disk {disk.disk}: {free >> 20} MiB are free beside {disk.below}, {needed >> 20} MiB are "
                f"needed to begin: {why}",
                "Make room there, or back it up while the VM is off.",
            )


def _room(folder: Path) -> tuple[int, int]:
    """(bytes free, the reserve) of the file system that holds a folder."""
    usage = shutil.disk_usage(folder)
    return usage.free, reserve(usage.total)


def too_full(growing: Sequence[Growing]) -> str:
    """Why there is only just room to merge the overlays of these disks, or "".

    What is in an overlay may need as much room once more in the file below it, before the overlay is gone. OSError.
    """
    by_device: dict[int, list[Growing]] = {}
    for disk in growing:
        by_device.setdefault(Path(disk.below).parent.stat().st_dev, []).append(disk)
    for there in by_device.values():
        folder = Path(there[0].below).parent
        free, kept = _room(folder)
        back = sum(min(_held(disk.overlay), disk.spread) for disk in there)
        if free <= kept + back:
            return (
                f"{free >> 20} MiB are free in {folder}, of which {kept >> 20} MiB are a reserve, and the merge may "
                f"need {back >> 20}"
            )
    return ""


def _held(path: str) -> int:
    try:
        return Path(path).stat().st_blocks * 512
    except FileNotFoundError:
        return 0
