"""The room where a VM's overlays grow: what a run needs, and whether there is still enough."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from backupcore.errors import TargetFull, from_os_error
from backupcore_libvirt.scratch import reserve

__all__ = ["Growing", "allocated", "require_room", "too_full"]


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
        if Path(below).is_block_device():
            return cls(disk, overlay, below, 0)
        try:
            held = Path(below).stat().st_blocks * 512
        except OSError as error:
            raise from_os_error(error, f"disk {disk}: {below}") from error
        return cls(disk, overlay, below, max(0, size - held))

    @property
    def on_device(self) -> bool:
        """Whether what lies below is a block device."""
        return Path(self.below).is_block_device()

    @property
    def beside(self) -> Path:
        """The folder in which the overlay grows."""
        return Path(self.overlay).parent

    @property
    def home(self) -> Path:
        """That in which the file below grows by the merge: another one where the disk's path is a link. A device does
        not grow.
        """
        return self.beside if self.on_device else Path(self.below).resolve().parent


def require_room(vm: str, growing: Iterable[Growing], losing: Mapping[str, int]) -> None:
    """TargetFull unless twice the reserve is free beside every disk.

    `losing` are disks on which QEMU does not stop a guest whose write fails, and their sizes: for these there must be
    room for all that can be written to them.
    """
    for disk in growing:
        lost = losing.get(disk.disk, 0)
        there = {disk.beside: lost}
        home = disk.beside if _device(disk.home) == _device(disk.beside) else disk.home
        there[home] = there.get(home, 0) + min(lost, disk.spread)
        for folder, more in there.items():
            free, kept = _room(folder)
            needed = more + kept if disk.disk in losing else 2 * kept
            if free >= needed:
                continue
            why = (
                "its error_policy makes the guest lose what it writes when the file system is full"
                if disk.disk in losing
                else "what the guest writes during a backup goes to an overlay, and then back into its file"
            )
            raise TargetFull(
                f"VM {vm}, disk {disk.disk}: {free >> 20} MiB are free in {folder}, {needed >> 20} MiB are "
                f"needed to begin: {why}",
                "Make room there, or back it up while the VM is off.",
            )


def _there(folder: Path) -> Path:
    """The folder, or as much of its path as there is yet."""
    return next(one for one in (folder, *folder.parents) if one.exists())


def _device(folder: Path) -> int:
    return _there(folder).stat().st_dev


def _room(folder: Path) -> tuple[int, int]:
    """(bytes free, the reserve) of the file system that holds a folder."""
    usage = shutil.disk_usage(_there(folder))
    return usage.free, reserve(usage.total)


def too_full(growing: Sequence[Growing]) -> str:
    """Why there is only just room to merge the overlays of these disks, or "".

    What is in an overlay may need as much room once more in the file below it, before the overlay is gone. OSError.
    """
    folders: dict[int, Path] = {}
    back: dict[int, int] = {}
    for disk in growing:
        for folder in (disk.beside, disk.home):
            folders.setdefault(_device(folder), folder)
        home = _device(disk.home)
        back[home] = back.get(home, 0) + min(allocated(disk.overlay), disk.spread)
    for device, folder in folders.items():
        free, kept = _room(folder)
        merged = back.get(device, 0)
        if free <= kept + merged:
            return (
                f"{free >> 20} MiB are free in {folder}, of which {kept >> 20} MiB are a reserve, and the merge may "
                f"need {merged >> 20}"
            )
    return ""


def allocated(path: str) -> int:
    """Bytes that a file takes of its file system; 0 where it is gone."""
    try:
        return Path(path).stat().st_blocks * 512
    except FileNotFoundError:
        return 0
