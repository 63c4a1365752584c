"""Who writes to a block device: a QEMU, above all, whose locks on device nodes nobody else meets."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = ["writers"]


def writers(device: int) -> list[str]:
    """The other processes that have the block device of that number (`st_rdev`) open for writing: "qemu (1234)".

    For a partition also those that have the whole disk open, for a disk those that have one of its partitions. Those of
    other users are seen by root alone. A process that opens and closes it meanwhile, as udev does to look at it, has it
    open for reading.
    """
    found = []
    devices = {device, *_sharing(device)}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int(process.name) != os.getpid() and any(_writes(process, one.name, devices) for one in _open(process)):
                found.append(f"{(process / 'comm').read_text().strip()} ({process.name})")
        except OSError:
            continue  # it has ended, or is another user's
    return found


def _sharing(device: int) -> Iterator[int]:
    """The numbers of the disk that this partition is of, or of the partitions that this disk has (sysfs)."""
    place = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    if (place / "partition").exists():
        numbers = [place.parent / "dev"]
    else:
        numbers = [one.with_name("dev") for one in place.glob("*/partition")]
    for number in numbers:
        major, _, minor = number.read_text().strip().partition(":")
        yield os.makedev(int(major), int(minor))


def _open(process: Path) -> list[Path]:
    return list((process / "fd").iterdir())


def _writes(process: Path, number: str, devices: set[int]) -> bool:
    try:
        there = (process / "fd" / number).stat()  # follows into whichever mount namespace it was opened in
        if not stat.S_ISBLK(there.st_mode) or there.st_rdev not in devices:
            return False
        told = (process / "fdinfo" / number).read_text()  # proc(5): flags are octal
    except OSError:
        return False  # closed meanwhile
    flags = re.search(r"^flags:\s*([0-7]+)$", told, re.MULTILINE)
    return flags is None or int(flags[1], 8) & os.O_ACCMODE != os.O_RDONLY
