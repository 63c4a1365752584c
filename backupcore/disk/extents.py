"""Byte ranges of a disk and the few operations on them, in bytes.

A *range* is ``(offset, length)``, half open; an `Extent` is a range that also says what is there. Every
function here takes and gives ranges in ascending order without overlaps, and works as a stream: nothing is
collected.

What an increment leaves alone is *not listed*. A `Kind.ZERO` extent is listed: those bytes were written, as
zeros, and leaving them out would bring old bytes back at restore.
"""

from __future__ import annotations

import enum
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, overload

__all__ = [
    "CLUSTER",
    "Extent",
    "ExtentTable",
    "Kind",
    "coalesce",
    "complement",
    "intersect",
    "to_clusters",
    "total",
]

CLUSTER = 65536
"""Bytes of one cluster of a disk artifact: the unit of tracking, digests and layout."""


class Kind(enum.Enum):
    """What an extent holds."""

    DATA = "data"
    """Bytes that have to be read."""
    ZERO = "zero"
    """Reads as zeros; need not be read."""


# Looked up here once: `Kind.DATA` goes through the metaclass each time, and there may be millions of extents.
_KINDS = _DATA, _ZERO = Kind.DATA, Kind.ZERO


class Extent(NamedTuple):
    """`length` bytes from `offset` of one kind."""

    offset: int
    length: int
    kind: Kind

    @property
    def end(self) -> int:
        """The first byte after the extent."""
        return self.offset + self.length


def coalesce(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The same bytes with adjoining extents of one kind joined; empty extents are dropped.

    Raises ValueError where the input is out of order or overlaps.
    """
    start = end = 0
    held: Kind | None = None
    for offset, length, kind in extents:
        if length <= 0:
            if length < 0:
                raise ValueError(f"the extent at {offset} has a negative length, {length}")
            continue
        if kind is held and offset == end:
            end += length
            continue
        if held is not None:
            if offset < end:
                raise ValueError(f"the extent at {offset} overlaps or precedes the one from {start} to {end}")
            yield Extent(start, end - start, held)
        start, end, held = offset, offset + length, kind
    if held is not None:
        yield Extent(start, end - start, held)


def intersect(extents: Iterable[Extent], ranges: Iterable[tuple[int, int]]) -> Iterator[Extent]:
    """The parts of `extents` that lie in `ranges`; clip to one range with ``[(offset, length)]``."""
    wanted = iter(ranges)
    current = next(wanted, None)
    for offset, length, kind in extents:
        end = offset + length
        while current is not None:
            first, last = current[0], current[0] + current[1]
            start, stop = max(offset, first), min(end, last)
            if start < stop:
                yield Extent(start, stop - start, kind)
            if last > end:
                break
            current = next(wanted, None)
        if current is None:
            return


def complement(extents: Iterable[Extent], size: int) -> Iterator[tuple[int, int]]:
    """The ranges of ``[0, size)`` that no extent covers."""
    position = 0
    for extent in extents:
        if extent.offset >= size:
            break
        if extent.offset > position:
            yield position, extent.offset - position
        position = max(position, extent.end)
    if position < size:
        yield position, size - position


def total(extents: Iterable[Extent], kind: Kind | None = None) -> int:
    """Bytes covered, of one kind or of all."""
    return sum(extent.length for extent in extents if kind is None or extent.kind is kind)


def to_clusters(extents: Iterable[Extent], size: int, cluster: int = CLUSTER) -> Iterator[Extent]:
    """Round `extents` of a disk of `size` bytes out to whole clusters, joined where they adjoin.

    - A cluster that is DATA in any part is DATA.
    - A cluster that is wholly ZERO is ZERO. The part of the last cluster past `size` counts as covered.
    - A cluster that is partly ZERO and otherwise not listed is DATA: it also holds bytes that nobody
      described, which must be read, and zeroing them would destroy them.
    - A cluster that is not listed in any part is not listed.

    The last extent may end past `size`, at the end of its cluster. Raises ValueError for extents past `size`,
    out of order or overlapping. Takes time by the number of extents, not of clusters.
    """
    return coalesce(_clusters(extents, size, cluster))


def _clusters(extents: Iterable[Extent], size: int, cluster: int) -> Iterator[Extent]:
    open_at = -1  # the cluster that is only known in part, the bytes of zeros seen in it, and whether data was seen
    zeros = 0
    data = False
    last = 0  # the end of the extent before

    def closed() -> Extent:
        whole = zeros == min(cluster, size - open_at)
        return Extent(open_at, cluster, Kind.ZERO if whole and not data else Kind.DATA)

    for first, length, kind in extents:
        offset, end = first, first + length
        if offset < 0 or end > size:
            raise ValueError(f"bytes {offset} to {end} lie outside a disk of {size} bytes")
        if offset < last or length < 0:
            raise ValueError(f"the extent at {offset} overlaps or precedes the one that ends at {last}")
        last = end
        while offset < end:
            start = offset - offset % cluster
            if open_at not in (-1, start):
                yield closed()
                open_at = -1
            if offset == start and open_at == -1:
                # A run of whole clusters, in one step: the cost must not grow with the size of the disk.
                whole = end - end % cluster if end < size else start + -(-(end - start) // cluster) * cluster
                if whole > start:
                    yield Extent(start, whole - start, kind)
                    offset = whole
                    continue
            if open_at == -1:
                open_at, zeros, data = start, 0, False
            stop = min(end, start + cluster)
            if kind is _DATA:
                data = True
            else:
                zeros += stop - offset
            offset = stop
    if open_at != -1:
        yield closed()


class ExtentTable(Sequence[Extent]):
    """An immutable, compact list of extents: 17 bytes for each, so 8 million of them take 136 MB.

    Takes extents in order (ValueError otherwise) and joins what adjoins. Picklable; may be shared by threads.
    """

    __slots__ = ("_kinds", "_lengths", "_starts")

    def __init__(self, extents: Iterable[Extent] = ()) -> None:
        starts, lengths, kinds = array("Q"), array("Q"), array("B")
        for offset, length, kind in coalesce(extents):
            starts.append(offset)
            lengths.append(length)
            kinds.append(kind is _ZERO)
        self._starts, self._lengths, self._kinds = starts, lengths, kinds

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Extent]:
        for offset, length, kind in zip(self._starts, self._lengths, self._kinds, strict=True):
            yield Extent(offset, length, _KINDS[kind])

    @overload
    def __getitem__(self, index: int) -> Extent: ...
    @overload
    def __getitem__(self, index: slice) -> ExtentTable: ...
    def __getitem__(self, index: int | slice) -> Extent | ExtentTable:
        if isinstance(index, slice):
            return ExtentTable(self[i] for i in range(*index.indices(len(self))))
        return Extent(self._starts[index], self._lengths[index], _KINDS[self._kinds[index]])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExtentTable):
            return NotImplemented
        return (self._starts, self._lengths, self._kinds) == (other._starts, other._lengths, other._kinds)

    __hash__ = None  # type: ignore[assignment]  # compares by content; hashing millions of rows helps nobody

    def __repr__(self) -> str:
        return f"<ExtentTable of {len(self)} extents>"

    def at(self, offset: int) -> Extent | None:
        """The extent that covers the byte at `offset`, or None where it is not listed."""
        index = self.index_at(offset)
        if index == len(self) or self._starts[index] > offset:
            return None
        return self[index]

    def index_at(self, offset: int) -> int:
        """The index of the first extent that ends after `offset`; ``len(self)`` if none does."""
        index = bisect_right(self._starts, offset)
        if index and self._starts[index - 1] + self._lengths[index - 1] > offset:
            return index - 1
        return index

    def within(self, offset: int, length: int) -> Iterator[Extent]:
        """The extents of ``[offset, offset + length)``, cut to that range."""
        end = offset + length
        for index in range(self.index_at(offset), len(self)):
            start = self._starts[index]
            if start >= end or length <= 0:
                return
            first, last = max(start, offset), min(start + self._lengths[index], end)
            yield Extent(first, last - first, _KINDS[self._kinds[index]])
