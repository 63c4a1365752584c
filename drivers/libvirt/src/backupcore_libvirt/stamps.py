"""Stamps: what the files below a disk's own were at the last backup. A change there is in no bitmap and in no overlay.

Nobody writes to them as long as the disk's own file lies on them, so each has the size and the time of its last write
that it had. A tool that copies a file keeps that time or makes a new one, so another file in its place has another
inode or another time. The times of its inode (ctime) tell nothing: libvirt changes owners and labels as a VM starts.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from backupcore_libvirt.qcow2_header import Header, backing, full_name, header_of

__all__ = ["Stamp", "changed", "passing_devices", "stamps_below", "stamps_of"]

Stamp = tuple[str, int, int, int]
"""(real path, inode, bytes, time of the last write in ns), 0 for what tells nothing; see `backupcore.model.Disk`."""

_PASSING = ("fuse", "9p", "virtiofs", "cifs", "smb3", "overlay", "vboxsf")
"""File systems that give a file another inode after the next mount, or when they have forgotten it."""
_MOST = 200  # files of one chain: what libvirt takes


def stamps_below(path: str, shape: str, told: Sequence[str] = ()) -> tuple[Stamp, ...]:
    """Those of every file below an image, from the top, by the headers; `told` are the first of them as the definition
    of a running VM has it. A file that keeps an image's data counts as well.
    """
    files: list[tuple[str, bool]] = []
    while shape == "qcow2" and len(files) < _MOST:
        header = _header(path)
        if header is None:
            break
        if header.data_file:
            files.append((full_name(path, header.data_file), bool(files)))  # that of the disk's own image is written to
        found = backing(path, header)
        if found is None:
            break
        path, shape = found.path, found.shape or "qcow2"
        files.append((path, True))
    frozen = [name for name, _ in files]
    files += [(name, True) for name in told if name and os.path.realpath(name) not in map(os.path.realpath, frozen)]
    return stamps_of(files)


def _header(path: str) -> Header | None:
    try:
        return header_of(path)
    except OSError:
        return None


def stamps_of(files: Iterable[tuple[str, bool]]) -> tuple[Stamp, ...]:
    """Those of (path, whether nobody writes to it)."""
    passing: set[int] | None = None
    found: list[Stamp] = []
    for path, frozen in files:
        if not path.startswith("/"):
            found.append((path, 0, 0, 0))  # on the network: its name is all that there is
            continue
        real, state = os.path.realpath(path), None
        with suppress(OSError):  # QEMU has it open, or will say what is wrong
            state = os.stat(real)  # noqa: PTH116 - a name, of which nothing else is asked
        if state is None or not stat.S_ISREG(state.st_mode):
            found.append((real, 0, 0, 0))  # a device: its node is made anew at each start of the host
            continue
        if passing is None:
            passing = passing_devices()
        inode = 0 if state.st_dev in passing else state.st_ino
        found.append((real, inode, state.st_size if frozen else 0, state.st_mtime_ns if frozen else 0))
    return tuple(found)


def changed(then: Sequence[Stamp], now: Sequence[Stamp]) -> str:
    """What has changed among the files below a disk, or ""."""
    before, after = [stamp[0] for stamp in then], [stamp[0] for stamp in now]
    if before != after:
        was, now_on = ", ".join(before) or "nothing", ", ".join(after) or "nothing"
        return f"what it lies on was exchanged since the last backup: {now_on}, then {was}"
    for (path, *old), (_, *new) in zip(then, now, strict=True):
        inode, *written = zip(old, new, strict=True)
        if all(inode) and inode[0] != inode[1]:
            return f"{path}, on which it lies, was exchanged since the last backup"
        if any(all(pair) and pair[0] != pair[1] for pair in written):
            return (
                f"{path}, on which it lies, was changed since the last backup: something has written to it, or has "
                "added or removed a bitmap in it"
            )
    return ""


def passing_devices() -> set[int]:
    """The devices of mounted file systems whose inodes tell nothing. Others number files for good, NFS too."""
    found = set()
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
            fields, _, rest = line.partition(" - ")
            if rest.split(" ", 1)[0].startswith(_PASSING):
                major, minor = fields.split(" ")[2].split(":")
                found.add(os.makedev(int(major), int(minor)))
    return found
