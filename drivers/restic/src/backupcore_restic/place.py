"""Where a new repository may be created: never in the empty folder of a disk that is not mounted."""

from __future__ import annotations

from pathlib import Path

from backupcore.errors import TargetUnavailable
from backupcore.mounts import unmounted

__all__ = ["creatable", "has_key"]

# restic's doc/design.rst, "Repository Layout". Only in a used one these two hold anything.
_LAYOUT = {"config", "data", "index", "keys", "locks", "snapshots"}
_USED = ("snapshots", "index")

STAGED = ("keys.", "config.")
"""What the names of files and folders begin with in which `backupcore_restic.creation` prepares a repository."""


def creatable(folder: Path, fstab: Path = Path("/etc/fstab")) -> None:
    """TargetUnavailable unless `folder` is a good place for a new repository.

    It is new or empty, the folder above exists, and no file system that belongs there is missing. So a disk that is
    not mounted, and a mistyped path, are errors and not a second repository on the host's own disk. What a creation
    makes may lie there: somebody may be at it, or may have been interrupted.
    """
    missing = unmounted(folder, fstab)
    if missing:
        raise TargetUnavailable(f"{folder}: nothing is mounted at {missing}", f"Mount it: mount {missing}")
    if not folder.parent.is_dir():
        raise TargetUnavailable(
            f"{folder}: the folder {folder.parent} does not exist", "Mount it, or create it for the new repository."
        )
    if any(_entries(folder / name) for name in _USED):
        raise TargetUnavailable(
            f"{folder} holds a restic repository without its file config",
            "Nothing in there can be read without that file: look for it in a copy, and remove nothing.",
        )
    if any(name not in _LAYOUT and not name.startswith(STAGED) for name in _entries(folder)):
        raise TargetUnavailable(f"{folder} holds files, but no restic repository", "Choose an empty folder.")


def has_key(folder: Path) -> bool:
    """Whether the key of a repository is there, which comes just before its configuration."""
    return bool(_entries(folder / "keys"))


def _entries(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []
