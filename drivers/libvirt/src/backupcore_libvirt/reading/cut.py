"""Noticing a disk that was shrunk and grown again: its size is as before, its bitmap looks healthy, its end is gone.

QEMU drops what a bitmap knows of the part that is cut off, and marks nothing when the disk grows again (seen with
qemu-img and block_resize 7.2). So the increment would leave alone what reads as zeros now, and a restore would bring
the old bytes back. What was cut off reaches to the end of the disk; so if there is any cluster that held data at the
last backup, was not written since and lies beyond the cut, then the last such cluster does. It is enough to look
whether that one still holds data. Where there is none, whatever held data beyond the cut is in the increment anyway.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence

from backupcore.disk.extents import CLUSTER, Extent, Kind, coalesce, complement, intersect
from backupcore.disk.nbd import ALLOCATION, Address, Client, allocation, dirty
from backupcore.disk.qcow2 import Layout

__all__ = ["REASON", "has_lost_its_bit", "tail", "was_cut"]

REASON = "it was shrunk and grown again since the last backup"

_KEPT = 64
"""How many of a disk's last extents are remembered; a guest that rewrites all of them between backups hides a cut."""


def tail(layout: Layout, before: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The last extents of data of a disk: (offset, length). `before` are those at the parent, none for a whole disk."""
    held = (extent for extent in layout.extents() if extent.kind is Kind.DATA)
    last = deque(coalesce(heapq.merge(_untouched(before, layout), held)), maxlen=_KEPT)
    return tuple((offset, length) for offset, length, _ in last)


def was_cut(address: Address, layout: Layout, before: Sequence[tuple[int, int]]) -> bool:
    """Whether the end of a disk was cut off since the parent, where `layout` is what its bitmap says has changed."""
    last = deque(_untouched(before, layout), maxlen=1)
    if not last:
        return False
    offset = last[0].end - CLUSTER
    with Client(address, [ALLOCATION]) as client:
        found = allocation(client, offset, min(CLUSTER, client.size - offset))
        return all(extent.kind is Kind.ZERO for extent in found)


def has_lost_its_bit(address: Address, mark: str) -> bool:
    """Whether a mark is empty: its one bit is that of the disk's end when it was made."""
    context = f"qemu:dirty-bitmap:{mark}"
    with Client(address, [context]) as client:
        return not any(dirty(client, context, 0, client.size))


def _untouched(before: Sequence[tuple[int, int]], layout: Layout) -> Iterator[Extent]:
    if not before:
        return iter(())
    extents = (Extent(offset, length, Kind.DATA) for offset, length in before)
    return intersect(extents, complement(layout.extents(), sum(before[-1])))
