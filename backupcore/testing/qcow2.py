"""The guest's view of a small qcow2 file, read as its specification says: without QEMU, and without our own reader."""

from __future__ import annotations

import struct
from pathlib import Path

__all__ = ["plain"]

_OFFSET = 0x00FF_FFFF_FFFF_FE00  # of L1 and L2 entries
_ZERO = 1


def plain(path: Path) -> bytes:
    """The bytes of the virtual disk. ValueError for what a restored disk never is: compressed, or on a backing file."""
    with path.open("rb") as file:
        magic, version, backing, _, bits, size, _, l1_size, l1_offset = struct.unpack(">4sIQIIQIIQ", file.read(48))
        if magic != b"QFI\xfb" or version != 3 or backing:
            raise ValueError(f"{path} is no plain qcow2 file")
        cluster = 1 << bits
        disk = bytearray(size)
        file.seek(l1_offset)
        l1 = struct.unpack(f">{l1_size}Q", file.read(8 * l1_size))
        for number, entry in enumerate(l1):
            if not entry & _OFFSET:
                continue
            file.seek(entry & _OFFSET)
            for index, found in enumerate(struct.unpack(f">{cluster // 8}Q", file.read(cluster))):
                if found >> 62 & 1:
                    raise ValueError(f"{path} has compressed clusters")
                if found & _OFFSET and not found & _ZERO:
                    file.seek(found & _OFFSET)
                    start = (number * (cluster // 8) + index) * cluster
                    data = file.read(min(cluster, size - start))
                    disk[start : start + len(data)] = data
        return bytes(disk)
