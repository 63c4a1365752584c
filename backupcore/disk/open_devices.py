"""Who writes to a block device: a QEMU, above all, whose locks on device nodes nobody else meets."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

__all__ = ["writers"]


def writers(device: int) -> list[str]:
    """The other processes that have the block device of that number (`st_rdev`) open for writing: "qemu (1234)".

    Those of other users are seen by root alone. A process that opens and closes it meanwhile, as udev does to look at
    it, has it open for reading.
    """
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int(process.name) != os.getpid() and any(_writes(process, one.name, device) for one in _open(process)):
                found.append(f"{(process / 'comm').read_text().strip()} ({process.name})")
        except OSError:
            continue  # it has ended, or is another user's
    return found


def _open(process: Path) -> list[Path]:
    return list((process / "fd").iterdir())


def _writes(process: Path, number: str, device: int) -> bool:
    try:
        there = (process / "fd" / number).stat()  # follows into whichever mount namespace it was opened in
        if not stat.S_ISBLK(there.st_mode) or there.st_rdev != device:
            return False
        told = (process / "fdinfo" / number).read_text()  # proc(5): flags are octal
    except OSError:
        return False  # closed meanwhile
    flags = re.search(r"^flags:\s*([0-7]+)$", told, re.MULTILINE)
    return flags is None or int(flags[1], 8) & os.O_ACCMODE != os.O_RDONLY
