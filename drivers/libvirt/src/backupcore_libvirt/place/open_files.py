"""Whether the files of a running VM's disks are still those that its QEMU has open.

A file that is moved, removed or exchanged under a running VM (`mv`, a restored copy, a file system mounted over its
folder) stays open in QEMU, and its path leads to another one; and a definition may put another file below an image than
its header does. Whoever reads by path and header reads another disk then. And QEMU itself opens a file anew by its name
where it becomes read-only or writable again, as below an overlay and at the end of a commit: it would go on in the
other file by the tables of the first, and destroy both.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from backupcore_libvirt.connection import Domain
from backupcore_libvirt.place.qemu_process import qemu_process
from backupcore_libvirt.stamps import passing_devices

__all__ = ["exchanged", "not_open"]

_Identity = tuple[int, int]
_LOST = "then what the guest writes is lost when the VM ends"


def exchanged(domain: Domain, files: Iterable[str]) -> str:
    """Which of these is no longer what the VM's QEMU has open, as a reason; "" if none is, or QEMU cannot be asked."""
    process = qemu_process(domain)
    return not_open(process, files) if process is not None else ""


def not_open(process: int, files: Iterable[str]) -> str:
    """The same of a process by its number."""
    opened, names = _opened(process)
    if not opened:
        return ""  # another user's process
    unsure = passing_devices()
    for path in files:
        try:
            found = os.stat(path)  # noqa: PTH116 - of a name, as QEMU takes it
        except FileNotFoundError:
            return f"{path} is gone, while the VM's QEMU has it open: what the guest writes is lost when the VM ends"
        except OSError:
            continue  # who reads it says why not
        known = _identity(found) in opened or (found.st_dev in unsure and os.path.realpath(path) in names)
        if not known:
            return (
                f"{path} is not the file that the VM's QEMU has open: was it exchanged while the VM runs ({_LOST}), or "
                "does the definition name another one below the disk (<backingStore>)?"
            )
    return ""


def _opened(process: int) -> tuple[set[_Identity], set[str]]:
    """What a process has open: by number, and by the names that the kernel has for it now."""
    found: set[_Identity] = set()
    names: set[str] = set()
    try:
        for one in Path(f"/proc/{process}/fd").iterdir():
            try:
                found.add(_identity(one.stat()))
                names.add(os.readlink(one))  # noqa: PTH115 - a Path would drop what is no path
            except OSError:
                continue  # closed meanwhile
    except OSError:
        return set(), set()
    return found, names


def _identity(found: os.stat_result) -> _Identity:
    # libvirt gives each VM device nodes of its own.
    return (-1, found.st_rdev) if stat.S_ISBLK(found.st_mode) else (found.st_dev, found.st_ino)
