"""What an export shows of one disk, turned into the layout of its artifact."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from backupcore.disk.extents import CLUSTER, Kind, intersect, to_clusters
from backupcore.disk.nbd import ALLOCATION, DEPTH, Address, Client, allocation, dirty, held
from backupcore.disk.qcow2 import Layout

__all__ = ["Export", "called", "layout_of"]

_NEAR = 16 << 20
_IMAGE_CLUSTER = 2 << 20


@dataclass(frozen=True, slots=True)
class Export:
    """Where one disk of a run can be read, and what tells the changes there.

    That is a bitmap, or how many files of a chain hold them, from the top (`depth`). Neither for the whole disk. `mark`
    is the bitmap that is the parent's mark, where it is exported; `marked` whether the image bears that of this run.
    """

    address: Address
    bitmap: str | None
    depth: int = 0
    mark: str | None = None
    marked: bool = False

    @property
    def whole(self) -> bool:
        """Whether all of the disk is taken."""
        return self.bitmap is None and not self.depth


def called(vm: str, disk: str) -> str:
    """What messages call the export of a disk of the VM of this name: nobody knows its socket."""
    return f"disk {disk} of VM {vm}"


def layout_of(export: Export, before: int | None = None) -> Layout:
    """The file of a disk: every block that holds data, or every block that changed. No connection stays open.

    `before` is its virtual size at the parent.
    """
    address = export.address
    if export.whole:
        return _allocated(address)
    if export.bitmap:
        return _changed(address, f"qemu:dirty-bitmap:{export.bitmap}", dirty, before)
    return _changed(address, DEPTH, partial(held, most=export.depth), before)


def _allocated(address: Address) -> Layout:
    with Client(address, [ALLOCATION]) as client:
        size = client.size
        held = (extent for extent in allocation(client, 0, size) if extent.kind is Kind.DATA)
        return Layout(size, to_clusters(held, size))


def _changed(
    address: Address,
    context: str,
    told: Callable[[Client, str, int, int], Iterable[tuple[int, int]]],
    before: int | None,
) -> Layout:
    # Two connections: one that shows both contexts would make QEMU look up the allocation of the whole disk as well.
    with Client(address, [context]) as client:
        size = client.size
        changed = heapq.merge(told(client, context, 0, size), _behind_the_end(before, size))
        ranges = list(_rounded(changed, size))
    with Client(address, [ALLOCATION]) as client:
        extents = (extent for offset, length in _joined(ranges) for extent in allocation(client, offset, length))
        return Layout(size, to_clusters(intersect(extents, ranges), size))


def _behind_the_end(before: int | None, size: int) -> Iterator[tuple[int, int]]:
    """What a disk that has grown may show behind its old end, and no bitmap tells.

    Where a disk was cut off within a cluster of its image, the rest of that cluster keeps its old bytes, and QEMU shows
    them when the disk grows again. (7.2; an image's cluster has 2 MiB at most.)
    """
    if before is not None and before < size and before % _IMAGE_CLUSTER:
        yield before, min(-(-before // _IMAGE_CLUSTER) * _IMAGE_CLUSTER, size) - before


def _rounded(ranges: Iterable[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """Rounded out to whole clusters (within the disk), joined: a bitmap may count in smaller units."""
    start = end = 0
    for offset, length in ranges:
        first = offset - offset % CLUSTER
        last = min(-(-(offset + length) // CLUSTER) * CLUSTER, size)
        if first <= end and end:
            end = max(end, last)
            continue
        if end:
            yield start, end - start
        start, end = first, last
    if end:
        yield start, end - start


def _joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges that lie near each other as one: one question to QEMU costs more than the metadata in a small gap."""
    start = end = 0
    for offset, length in ranges:
        if end and offset - end <= _NEAR:
            end = offset + length
            continue
        if end:
            yield start, end - start
        start, end = offset, offset + length
    if end:
        yield start, end - start
