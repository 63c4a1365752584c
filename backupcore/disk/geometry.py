"""Where the parts of our qcow2 files lie, and the parts that need no more than that: header and refcounts.

The form and the reasons for it are told in `backupcore.disk.qcow2`; field names follow QEMU's
``docs/interop/qcow2.txt``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from backupcore.disk.extents import CLUSTER
from backupcore.errors import UnsupportedOperation

__all__ = ["Geometry"]

SECTOR = 512
MAGIC = b"QFI\xfb"
HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
"""magic, version, backing file's offset and length, cluster bits, size, encryption, L1 entries, L1 offset, refcount
table's offset and clusters, snapshots and their offset, incompatible, compatible and autoclear features, refcount
order, header length. Eight zero bytes behind it end the list of header extensions."""

ENTRIES = CLUSTER // 8  # of an L1, L2 or refcount table's cluster
L2_SPAN = ENTRIES * CLUSTER  # guest bytes that one L2 table maps: 512 MiB
REFCOUNTS = CLUSTER // 2  # file clusters that one refcount block counts: 2 GiB
COPIED = 1 << 63  # set in an L1 or L2 entry whose target has refcount 1
ZERO = 1  # the L2 entry of a cluster of zeros that has no data cluster
_MAX_L1 = 4 << 20  # entries; QEMU opens no L1 table of more than 32 MiB
_MAX_REFCOUNT_TABLE = 128  # clusters; QEMU opens none of more than 8 MiB


_ONES = int.from_bytes((1).to_bytes(8, "big") * ENTRIES, "big")
_STEPS = int.from_bytes(struct.pack(f">{ENTRIES}Q", *range(0, ENTRIES * CLUSTER, CLUSTER)), "big")


def clusters_of(length: int) -> int:
    """How many clusters hold `length` bytes."""
    return -(-length // CLUSTER)


def row(first: int, count: int) -> bytes:
    """`count` table entries (at most `ENTRIES`) as they lie in the file, each a cluster further than the one before."""
    if count < 256:
        return struct.pack(f">{count}Q", *range(first, first + count * CLUSTER, CLUSTER))
    # A table as one large number: six times as fast as 8192 small ones, and a disk of 1 TiB has 2048 tables.
    rest = 64 * (ENTRIES - count)
    return ((_STEPS >> rest) + (_ONES >> rest) * first).to_bytes(count * 8, "big")


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where the parts of a file lie, in clusters from its start. `clusters` is the length of the whole file."""

    virtual_size: int
    clusters: int

    @classmethod
    def around(cls, virtual_size: int, payload: int) -> Geometry:
        """The geometry of a file that holds `payload` clusters of L2 tables and data.

        Raises ValueError for a disk without bytes, UnsupportedOperation for one that QEMU could not open.
        """
        if virtual_size <= 0:
            raise ValueError(f"a disk of {virtual_size} bytes has no layout")
        if -(-virtual_size // L2_SPAN) > _MAX_L1:
            raise UnsupportedOperation(f"a disk of {virtual_size} bytes is too large: qcow2 ends at 2 PiB")
        # Refcount blocks count themselves, so more of them may need one more: the first length that stays is taken.
        clusters = payload
        while (found := cls(virtual_size, clusters)).l2 + payload != clusters:
            clusters = found.l2 + payload
        if found.refcount_table > _MAX_REFCOUNT_TABLE:
            raise UnsupportedOperation(f"a backup of {clusters * CLUSTER} bytes is too large: qcow2 files end at 2 PiB")
        return found

    @property
    def l1_entries(self) -> int:
        """Entries of the L1 table, one for every 512 MiB of the disk."""
        return -(-self.virtual_size // L2_SPAN)

    @property
    def refcount_blocks(self) -> int:
        """Clusters of refcounts."""
        return -(-self.clusters // REFCOUNTS)

    @property
    def refcount_table(self) -> int:
        """Clusters of the table of refcount blocks."""
        return -(-self.refcount_blocks // ENTRIES)

    @property
    def first_block(self) -> int:
        """The first refcount block; the refcount table lies before it, from cluster 1."""
        return 1 + self.refcount_table

    @property
    def l1(self) -> int:
        """The first cluster of the L1 table."""
        return self.first_block + self.refcount_blocks

    @property
    def l2(self) -> int:
        """The first L2 table."""
        return self.l1 + clusters_of(self.l1_entries * 8)

    def header(self) -> bytes:
        """The first cluster of the file."""
        return header(
            self.virtual_size,
            l1_offset=self.l1 * CLUSTER,
            refcount_table_offset=CLUSTER,
            refcount_table_clusters=self.refcount_table,
        )

    def refcount_table_cluster(self, index: int) -> bytes:
        """Cluster `index` of the refcount table."""
        return table(self.first_block * CLUSTER, index * ENTRIES, self.refcount_blocks)

    def refcount_block(self, index: int) -> bytes:
        """Refcount block `index`."""
        return refcounts(self.clusters - index * REFCOUNTS)


def header(virtual_size: int, *, l1_offset: int, refcount_table_offset: int, refcount_table_clusters: int) -> bytes:
    """The header cluster of a file; offsets in bytes."""
    fields = HEADER.pack(
        MAGIC,
        3,
        0,
        0,
        CLUSTER.bit_length() - 1,
        -(-virtual_size // SECTOR) * SECTOR,
        0,
        -(-virtual_size // L2_SPAN),
        l1_offset,
        refcount_table_offset,
        refcount_table_clusters,
        0,
        0,
        0,
        0,
        0,
        4,
        HEADER.size,
    )
    return fields.ljust(CLUSTER, b"\0")


def table(first_offset: int, first: int, count: int) -> bytes:
    """A cluster of the refcount table from entry `first` on: `count` blocks in all lie in a row from `first_offset`."""
    here = max(0, min(ENTRIES, count - first))
    start = first_offset + first * CLUSTER
    return row(start, here).ljust(CLUSTER, b"\0")


def refcounts(clusters: int) -> bytes:
    """A refcount block whose first `clusters` clusters are in use once (at most as many as it counts)."""
    return (b"\0\1" * min(REFCOUNTS, clusters)).ljust(CLUSTER, b"\0")
