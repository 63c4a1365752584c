"""The folder of a VM's overlays in scratch: what tells of the overlays of single runs, whoever has died meanwhile.

``SCRATCH/overlays/UUID/`` holds the overlays of the VM's block devices, beside which there is no room, and a link to
each one that lies beside a file: a disk may be detached during a run, and nothing else tells then what is in its
overlay. Beside that of a device lies a note of which device it is (`device`). The folder goes with the last of them. It
belongs to us, and QEMU's user can only pass it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from backupcore.errors import from_os_error
from backupcore_libvirt.overlay import device
from backupcore_libvirt.overlay.stack import base_of, disk_of, is_temporary, overlays_beside

__all__ = ["OverlayFolder"]

_NAME = "overlays"
_MAKE_LIMIT = 100
_IN_MEMORY = ("tmpfs", "ramfs")


class OverlayFolder:
    """That of the VM with this UUID. Building it touches nothing."""

    def __init__(self, scratch: Path, vm: str) -> None:
        self.path = scratch / _NAME / vm

    def note(self, overlays: list[str]) -> None:
        """Make the folder, and note overlays that are about to be made; on the disk when this returns.

        AccessDenied, TargetFull.
        """
        try:
            self._make()
            for overlay in overlays:
                link = self.path / Path(overlay).name
                if str(link) != overlay and not link.is_symlink():
                    link.symlink_to(overlay)
                elif str(link) == overlay:
                    device.note(overlay, base_of(overlay))
            for folder in (self.path, *list(self.path.parents)[:2]):
                _sync(folder)
        except OSError as error:
            raise from_os_error(error, f"scratch folder {self.path}") from error

    def _make(self) -> None:
        for tried in range(_MAKE_LIMIT):
            try:
                self.path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
                self.path.mkdir(mode=0o711, exist_ok=True)
            except FileNotFoundError:  # another VM's run has just removed the upper one
                if tried + 1 == _MAKE_LIMIT:
                    raise
            else:
                return

    def noted(self) -> list[str]:
        """The overlays of single runs that lie here or are noted here, and are there; also those that hold nothing."""
        try:
            names = sorted(os.listdir(self.path))  # noqa: PTH208 - names, not paths
        except OSError:
            return []
        found = []
        for name in names:
            path = self.path / name
            with suppress(OSError):
                overlay = str(path.readlink() if path.is_symlink() else path)
                if is_temporary(overlay) and Path(overlay).is_file() and not Path(overlay).is_symlink():
                    found.append(overlay)
        return found

    def of(self, base: str, disk: str) -> list[str]:
        """Every overlay of a disk whose file or device is `base`, used or not: those beside it, and those here."""
        here = [path for path in self.noted() if base_of(path) == base and disk_of(path) == disk]
        return list(dict.fromkeys([*overlays_beside(base, disk), *here]))

    def tidy(self) -> None:
        """Forget the overlays that are gone, and remove the folder if none is left."""
        with suppress(OSError):  # nothing hangs on it: whoever looks passes by what is gone
            for path in self.path.iterdir():
                of = path.readlink() if path.is_symlink() else Path(str(path).removesuffix(device.SUFFIX))
                if of != path and not os.path.lexists(of):
                    path.unlink()
            self.path.rmdir()
            self.path.parent.rmdir()

    def in_memory(self) -> bool:
        """Whether its file system is lost when the host is: an overlay there would be, too."""
        there = next(folder for folder in (self.path, *self.path.parents) if folder.exists())
        device = there.stat().st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        mounts = (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines())
        return any(mount[2] == number and mount[mount.index("-") + 1] in _IN_MEMORY for mount in mounts)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
