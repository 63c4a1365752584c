"""Which device an overlay was put on: a path such as /dev/sdb may be another one after a start of the host.

A note beside the overlay, in scratch, holds what stays with a device: its size, and what the kernel shows of its
identity in ``/sys/dev/block/MAJOR:MINOR``. Whoever merges holds it against the device that the path means now.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from backupcore.errors import HypervisorError, from_os_error
from backupcore.typed import typed

__all__ = ["SUFFIX", "forget", "note", "require_same"]

SUFFIX = ".device"
_MARKS = (
    *("dm/uuid", "md/uuid", "loop/backing_file", "partition"),
    *("wwid", "device/wwid", "serial", "device/serial", "device/vpd_pg80"),
)
"""LVM and multipath, loop devices, partitions; NVMe, SCSI, virtio. Of a partition those of its disk count as well."""
_LONGEST = 4096


class _Identity(NamedTuple):
    """The size of a device in bytes, and the kernel's marks of it by their names."""

    size: int
    marks: dict[str, str]

    def __str__(self) -> str:
        return ", ".join([f"{self.size} bytes", *(f"{name} {text}" for name, text in self.marks.items())])[:300]

    def may_have_become(self, later: _Identity) -> bool:
        """Whether that may be the same device: one with marks can have grown, of one without the size tells alone."""
        return self.marks == later.marks and (self.size == later.size or (bool(self.marks) and self.size < later.size))


def note(overlay: str, device: str) -> None:
    """Write down, durably, which device this path means now, beside the overlay that is about to be made on it.

    AccessDenied, TargetFull.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        text = json.dumps(_identity(device)._asdict())
        with os.fdopen(os.open(overlay + SUFFIX, flags, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise from_os_error(error, f"the note of the overlay {overlay}") from error


def require_same(overlay: str, device: str) -> None:
    """HypervisorError where the path does not mean the device any more on which the overlay was put.

    Nothing is said where there is no note: an older version made the overlay.
    """
    written = Path(overlay + SUFFIX)
    try:
        said = json.loads(written.read_bytes()[:_LONGEST])
        then = _Identity(int(said["size"]), dict(said["marks"]))
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise HypervisorError(
            f"{overlay} is not merged: {written} cannot be read, which tells whether {device} is still its device",
            f"If it is the same device, remove that note: {typed('rm', written)}",
        ) from error
    try:
        now = _identity(device)
    except OSError as error:
        raise HypervisorError(
            f"{overlay} is not merged: its device {device} cannot be read ({error.strerror})",
            "Bring it back, or activate its volume.",
        ) from error
    if not then.may_have_become(now):
        raise HypervisorError(
            f"{overlay} is not merged: {device} is another device now than when the overlay was put on it (then "
            f"{then}; now {now})",
            "Has the host been started since, and do its devices have other names? Put the right one under that name, "
            "or have the VM use a name that stays (/dev/disk/by-id/...). Until then do not start the VM.",
        )


def forget(overlay: str) -> None:
    """Remove the note of an overlay that was merged. Idempotent."""
    with suppress(OSError):
        Path(overlay + SUFFIX).unlink()


def _identity(device: str) -> _Identity:
    handle = os.open(device, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        size = os.lseek(handle, 0, os.SEEK_END)
        number = os.fstat(handle).st_rdev
    finally:
        os.close(handle)
    place = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    found = dict(_marks(place))
    if "partition" in found:
        found |= {f"disk {name}": text for name, text in _marks(place.parent)}
    return _Identity(size, found)


def _marks(place: Path) -> Iterator[tuple[str, str]]:
    for name in _MARKS:
        with suppress(OSError):
            text = (place / name).read_bytes()[:_LONGEST].decode(errors="replace").strip("\0 \n")
            if text:
                yield name, "".join(letter if letter.isprintable() else "?" for letter in text)
