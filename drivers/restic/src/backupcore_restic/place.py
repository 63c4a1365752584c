"""Where a new repository may be created: never in the empty folder of a disk that is not mounted."""

from __future__ import annotations

from pathlib import Path

from backupcore.errors import TargetUnavailable
from backupcore.mounts import unmounted

__all__ = ["creatable"]


def creatable(folder: Path, fstab: Path = Path("/etc/fstab")) -> None:
    """TargetUnavailable unless `folder` is a good place for a new repository.

    It is new or empty, the folder above exists, and no file system that belongs there is missing. So a disk that is
    not mounted, and a mistyped path, are errors and not a second repository on the host's own disk.
    """
    missing = unmounted(folder, fstab)
    if missing:
        raise TargetUnavailable(f"{folder}: nothing is mounted at {missing}", f"Mount it: mount {missing}")
    if not folder.parent.is_dir():
        raise TargetUnavailable(
            f"{folder}: the folder {folder.parent} does not exist", "Mount it, or create it for the new repository."
        )
    if folder.is_dir() and next(folder.iterdir(), None) is not None:
        raise TargetUnavailable(
            f"{folder} holds files, but no restic repository",
            "Choose an empty folder. What is left of a repository whose creation was interrupted can be removed.",
        )
