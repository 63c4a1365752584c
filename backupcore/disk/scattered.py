"""The qcow2 file of a disk whose data clusters lie in another order than the guest's, and of which some may be dead.

A store that copies on its own side flattens a chain into such a file: the data of the full as they lie, then what the
increments replace them by. Nothing is moved, so the clusters that were replaced stay in the file: nothing refers to
them, and their refcount is 0. All else is as `backupcore.disk.qcow2` says: the same header, tables in the same order,
the data behind them. A full has no explicit zero clusters, so an L2 entry is 0 or a data cluster that no other entry
has.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

from backupcore.disk.extents import CLUSTER, Extent, Kind, coalesce
from backupcore.disk.geometry import COPIED, ENTRIES, L2_SPAN, REFCOUNTS, Geometry, clusters_of, row
from backupcore.disk.qcow2 import Tables

__all__ = ["ScatteredLayout"]


class ScatteredLayout(Tables):
    """The file that holds these `pieces` of a disk: (guest offset, bytes, index of the first data cluster in the file).

    Pieces are sorted by guest offset and made of whole clusters; the last one may end past `virtual_size`. `clusters`
    is the number of data clusters in the file, dead ones included. ValueError for pieces that overlap, in the guest or
    in the file. Memory: 24 bytes for each piece. Attributes are those of `backupcore.disk.qcow2.Layout`.
    """

    def __init__(self, virtual_size: int, pieces: Iterable[tuple[int, int, int]], clusters: int) -> None:
        self._offsets, self._counts, self._indexes = array("Q"), array("Q"), array("Q")
        self._l2 = array("I")
        limit = clusters_of(virtual_size) * CLUSTER
        end = at = 0  # of the piece before, in the guest and in the file
        last = -1
        live = 0
        for offset, length, index in pieces:
            if offset % CLUSTER or length % CLUSTER or length <= 0 or not end <= offset < offset + length <= limit:
                raise ValueError(f"{length} bytes at {offset} are out of place on a disk of {virtual_size} bytes")
            count = length // CLUSTER
            if self._offsets and offset == end and index == at:
                self._counts[-1] += count
            else:
                self._offsets.append(offset)
                self._counts.append(count)
                self._indexes.append(index)
            end, at = offset + length, index + count
            live += count
            final = (end - 1) // L2_SPAN
            self._l2.extend(range(max(last + 1, offset // L2_SPAN), final + 1))
            last = final
        self._dead = self._unused(clusters)
        self._geometry = Geometry.around(virtual_size, len(self._l2) + clusters)
        self.virtual_size = virtual_size
        self.clusters = clusters
        self.live = live
        self.size = self._geometry.clusters * CLUSTER
        self.data_offset = self.size - clusters * CLUSTER

    def _unused(self, clusters: int) -> list[tuple[int, int]]:
        """(first, end) of the data clusters that no piece has."""
        found = []
        end = 0
        for number in sorted(range(len(self._indexes)), key=self._indexes.__getitem__):
            first = self._indexes[number]
            if first < end:
                raise ValueError(f"data cluster {first} is used twice")
            if first > end:
                found.append((end, first))
            end = first + self._counts[number]
        if end > clusters:
            raise ValueError(f"data cluster {end - 1} of {clusters}")
        if end < clusters:
            found.append((end, clusters))
        return found

    def __repr__(self) -> str:
        return (
            f"<ScatteredLayout of {self.virtual_size} bytes with {self.live} of {self.clusters} data clusters in use>"
        )

    def extents(self) -> Iterator[Extent]:
        """The extents, neighbours joined."""
        return coalesce(
            Extent(offset, count * CLUSTER, Kind.DATA)
            for offset, count in zip(self._offsets, self._counts, strict=True)
        )

    def places(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(guest offset, index of its data cluster in the file, clusters) of the data in a range of whole clusters."""
        end = offset + length
        for number in range(max(0, bisect_right(self._offsets, offset) - 1), len(self._offsets)):
            start, count = self._offsets[number], self._counts[number]
            if start >= end:
                return
            first, last = max(start, offset), min(start + count * CLUSTER, end)
            if first < last:
                yield first, self._indexes[number] + (first - start) // CLUSTER, (last - first) // CLUSTER

    def _refcount_block(self, index: int) -> bytes:
        block = bytearray(self._geometry.refcount_block(index))
        start = index * REFCOUNTS - self.data_offset // CLUSTER  # the block's first cluster, counted from the data
        for number in range(max(0, bisect_left(self._dead, (start, 0)) - 1), len(self._dead)):
            first, end = self._dead[number]
            if first >= start + REFCOUNTS:
                break
            low, high = max(first - start, 0), min(end - start, REFCOUNTS)
            if low < high:
                block[low * 2 : high * 2] = bytes((high - low) * 2)
        return bytes(block)

    def _l2_table(self, index: int) -> bytes:
        start = index * L2_SPAN
        entries = bytearray(CLUSTER)
        for offset, first, count in self.places(start, L2_SPAN):
            at = (offset - start) // CLUSTER * 8
            entries[at : at + count * 8] = row(COPIED | (self.data_offset + first * CLUSTER), count)
        assert len(entries) == ENTRIES * 8
        return bytes(entries)
