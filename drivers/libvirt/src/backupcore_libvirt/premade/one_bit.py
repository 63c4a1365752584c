"""An empty qcow2 image with a bitmap of a single bit, that of the disk's last cluster: what a mark is made of.

QEMU's own programs would need two calls for it, one that adds the bitmap and one that writes. Three clusters follow the
tables of an image that holds nothing: the bitmaps' directory, the table of the one bitmap, and the part of it in which
the bit lies. See ``docs/interop/qcow2.txt`` of QEMU.
"""

from __future__ import annotations

import struct
from pathlib import Path

from backupcore.disk.extents import CLUSTER
from backupcore.disk.geometry import ENTRIES, HEADER, Geometry, clusters_of
from backupcore.errors import UnsupportedOperation
from backupcore_libvirt.premade.image import write_new

__all__ = ["make_one_bit"]

_AUTOCLEAR, _AUTOCLEAR_AT = struct.Struct(">Q"), 88
_BITMAPS = 1  # bit 0 of those features: the extension is what it says
_EXTENSION = struct.Struct(">IIIIQQ")  # kind, length; how many bitmaps, reserved, bytes and offset of the directory
_KIND = 0x23852875
_ENTRY = struct.Struct(">QIIBBHI")  # offset and entries of the table, flags, type, log2 of a bit's bytes, two lengths
_PER_CLUSTER = CLUSTER * 8  # bits


def make_one_bit(path: Path, size: int, name: str) -> None:
    """Make an image of `size` bytes, mode 0600, whose bitmap `name` has one bit for each 64 KiB, the last of them set.

    AccessDenied, TargetFull; UnsupportedOperation for a disk of more than 256 TiB.
    """
    last = clusters_of(size) - 1
    entries = last // _PER_CLUSTER + 1
    if entries > ENTRIES:
        raise UnsupportedOperation(f"no mark is made for a disk of {size} bytes")
    place = Geometry.around(size, 3)
    directory, table, bits = (bytearray(CLUSTER) for _ in range(3))
    first = place.l2 * CLUSTER
    entry = _ENTRY.pack(first + CLUSTER, entries, 0, 1, CLUSTER.bit_length() - 1, len(name), 0) + name.encode("ascii")
    entry = entry.ljust(-(-len(entry) // 8) * 8, b"\0")
    directory[: len(entry)] = entry
    struct.pack_into(">Q", table, (entries - 1) * 8, first + 2 * CLUSTER)
    bit = last % _PER_CLUSTER
    bits[bit // 8] = 1 << bit % 8
    header = bytearray(place.header())
    _AUTOCLEAR.pack_into(header, _AUTOCLEAR_AT, _BITMAPS)
    _EXTENSION.pack_into(header, HEADER.size, _KIND, _EXTENSION.size - 8, 1, 0, len(entry), first)
    image = b"".join(
        [
            header,
            *(place.refcount_table_cluster(index) for index in range(place.refcount_table)),
            *(place.refcount_block(index) for index in range(place.refcount_blocks)),
            bytes((place.l2 - place.l1) * CLUSTER),
            directory,
            table,
            bits,
        ]
    )
    write_new(path, bytearray(image))
