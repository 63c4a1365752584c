"""Where a new repository may be created: never in the empty folder of a disk that is not mounted."""

from __future__ import annotations

import re
from pathlib import Path

from backupcore.errors import TargetUnavailable

__all__ = ["creatable", "unmounted"]


def unmounted(folder: Path, fstab: Path = Path("/etc/fstab")) -> Path | None:
    """The mount point above (or at) `folder` that the host's fstab lists, and where nothing is mounted."""
    try:
        lines = fstab.read_text(errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        if len(fields) < 2 or fields[0].startswith("#") or not fields[1].startswith("/"):
            continue
        # fstab(5): blanks in a name are written as octal escapes
        point = Path(re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[1]))
        if (point == folder or point in folder.parents) and not point.is_mount():
            return point
    return None


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
