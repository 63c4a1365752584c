"""Mount points of FUSE file systems: which there are, and how they go."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

__all__ = ["mount_points", "unmount", "unmount_below", "unmount_command"]

_COMMAND = 10.0  # seconds for one call of fusermount3


def mount_points() -> list[str]:
    """The mount points of this process, the innermost last. No file system is asked: a dead one would not answer."""
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    # Blanks and backslashes in a path are written as octal escapes (proc(5)).
    return [os.fsdecode(line.split()[4].decode("unicode_escape").encode("latin-1")) for line in lines]


def unmount_command(path: str | None = None) -> str | None:
    """The program that mounts and unmounts for users, as the installed libfuse has it; None if there is none.

    `path` is a search path as in $PATH, this process's own if None.
    """
    return shutil.which("fusermount3", path=path) or shutil.which("fusermount", path=path)


def unmount(path: str) -> bool:
    """Unmount, lazily if it is in use: then it goes away with its last reader. False if neither works."""
    command = unmount_command()
    for flags in (["-u"], ["-u", "-z"]) if command else ():
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            line = [str(command), *flags, path]
            if subprocess.run(line, check=False, capture_output=True, timeout=_COMMAND).returncode == 0:
                return True
    return False


def unmount_below(folder: Path) -> None:
    """Unmount all below `folder`: what is left when those that served it were killed. Never raises."""
    root = f"{folder.resolve()}/"
    for mounted in reversed(mount_points()):
        if mounted.startswith(root):
            unmount(mounted)
