"""What an image's last cluster holds behind the disk's end, which no guest should see again.

Where a qcow2 image was shrunk to a size that is no whole number of its clusters, QEMU (7.2) leaves the rest of the last
one as it was, and shows it when the image grows. A commit lets the file below grow: bytes that the overlay above
had covered with zeros would be seen by the guest, though no increment tells of them.
"""

from __future__ import annotations

import os

from backupcore.errors import UnsupportedOperation, from_os_error
from backupcore_libvirt import qemu_img

__all__ = ["clear"]


def clear(path: str, shape: str) -> None:
    """Zero it, in the file itself: nobody reads it there, whatever has the image open, while it is not written to.

    A raw image ends where it was cut. UnsupportedOperation for a cluster that is compressed, which cannot be changed in
    place, that may also be a snapshot's, or of which only parts may be there, so that none tells where it begins.
    """
    if shape != "qcow2":
        return
    found = qemu_img.info(path, shape)
    inside = found.virtual_size % found.cluster_size
    if not inside:
        return
    extent = qemu_img.last_extent(path, found.virtual_size - inside, found.cluster_size)
    if extent is None and not found.subclusters:
        return
    if extent is None or extent.offset is None or found.subclusters or found.data_elsewhere or found.snapshots:
        compressed = extent is not None and extent.offset is None
        what = "is compressed" if compressed else "has subclusters, is a snapshot's, or lies in another file"
        raise UnsupportedOperation(
            f"{path}: its last cluster {what}, and what that holds behind the disk's end would be seen once it grows",
            "With the VM off: qemu-img convert it to a new image, and let the VM use that.",
        )
    _zero(path, extent.offset + inside, found.cluster_size - inside)


def _zero(path: str, offset: int, length: int) -> None:
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.pread(file, length, offset).strip(b"\0"):
                os.pwrite(file, bytes(length), offset)
                os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        raise from_os_error(error, f"clearing the end of {path}") from error
