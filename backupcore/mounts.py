"""Is the disk there? What the host's fstab says should be mounted, held against what is."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["unmounted"]


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
