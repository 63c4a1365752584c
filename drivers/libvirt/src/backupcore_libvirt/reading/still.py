"""Whether files stay as they are while they are read.

QEMU's lock keeps QEMUs away, and nobody else (`dd`, a restored copy); on a file system without locks it keeps nobody.
What was written to a file is told by its size and the time of its last write, what took its place by its number.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from backupcore.disk.open_devices import writers
from backupcore.errors import Busy, HypervisorError

__all__ = ["Stamps", "changed", "require_still", "require_unwritten", "stamps"]

Stamps = Mapping[str, tuple[int, ...] | None]
"""By path; None for a file that is not there. Devices have none."""


def stamps(files: Iterable[str]) -> Stamps:
    """What tells whether these files are still the same, and unwritten. OSError."""
    found: dict[str, tuple[int, ...] | None] = {}
    for path in files:
        try:
            one = os.stat(path)  # noqa: PTH116 - of a name, as QEMU takes it
        except FileNotFoundError:
            found[path] = None
            continue
        if stat.S_ISREG(one.st_mode):
            # Not the time of the last change of owner or mode: libvirt changes both as a VM starts and stops.
            found[path] = (one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns)
    return found


def changed(before: Stamps) -> list[str]:
    """The files that are not as they were. OSError."""
    now = stamps(before)
    return [path for path, stamp in before.items() if now[path] != stamp]


def require_still(vm: str, before: Stamps, there: Iterable[str] = ()) -> None:
    """HypervisorError where a file that the backup of this VM reads was written to, or one of `there` has vanished."""
    written = changed(before)
    gone = [path for path in there if not os.path.lexists(path)]
    if not written and not gone:
        return
    what = f"{', '.join(written)} was written to or exchanged" if written else f"the overlay {', '.join(gone)} vanished"
    raise HypervisorError(
        f"VM {vm}: {what} while its backup read its disks, so what was read is no single instant",
        "Was the VM started elsewhere, or an overlay merged (virsh blockcommit, qemu-img commit), or a file restored? "
        "Leave its files alone while it is backed up, and run the backup again.",
    )


def require_unwritten(vm: str, files: Iterable[str]) -> None:
    """Busy where somebody has one of these open for writing that is a block device. QEMU's lock does not tell: libvirt
    gives each VM device nodes of its own, and a lock is one node's.
    """
    for path in files:
        try:
            found = Path(path).stat()
        except OSError:
            continue  # who reads it says so
        if stat.S_ISBLK(found.st_mode) and (others := writers(found.st_rdev)):
            raise Busy(
                f"VM {vm} is off, and its device {path} is open for writing in {', '.join(others)}",
                "Is another VM defined on that device, and running? Its backup holds the disk; or power it off first.",
            )
