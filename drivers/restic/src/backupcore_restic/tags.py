"""A run's labels as tags of a snapshot, and back.

Every snapshot of ours has the tag ``backupcore`` and one tag ``key=value`` per label. restic splits a tag at commas and
has no escape for them, so values are percent-encoded; those that the core gives today come out as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from urllib.parse import quote, unquote

__all__ = ["MARK", "extent_tag", "from_extent_tag", "from_tags", "of_vm", "run_tag", "to_tags"]

MARK = "backupcore"
_EXTENT = f"{MARK}-holds:"  # no "=": it is no label


def to_tags(labels: Mapping[str, str]) -> list[str]:
    """The tags for these labels, the mark first."""
    return [MARK, *(f"{key}={quote(value, safe=':+')}" for key, value in labels.items())]


def of_vm(vm: str) -> str:
    """What restic takes for "both tags": the mark, and the label of this VM."""
    return ",".join(to_tags({"vm": vm}))


def run_tag(run: str) -> str:
    """The tag by which what one run has stored is found. Not its point: a flatten keeps that of an older snapshot."""
    return f"run-{run}"


def extent_tag(files: int, size: int) -> str:
    """The tag that says how much a complete snapshot holds; it is known before a byte is read."""
    return f"{_EXTENT}{files}.{size}"


def from_extent_tag(tags: Iterable[str]) -> tuple[int, int] | None:
    """The number of files and of bytes that these tags promise; None if they promise nothing."""
    for tag in tags:
        files, _, size = tag.removeprefix(_EXTENT).partition(".")
        if tag.startswith(_EXTENT) and files.isdecimal() and size.isdecimal():
            return int(files), int(size)
    return None


def from_tags(tags: Iterable[str]) -> dict[str, str]:
    """The labels in these tags; what is no label (a tag of the user's) is skipped."""
    return {key: unquote(value) for key, mark, value in (tag.partition("=") for tag in tags) if mark}
