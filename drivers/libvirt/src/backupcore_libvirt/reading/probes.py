"""Probes: what a few clusters of a disk held at a backup, so that the next one can see whether they still do.

A bitmap, or an overlay, says what has changed. Whatever has written past it, or has put another disk in its place, has
left a cluster that reads otherwise and is said not to have changed. They lie at doubling distances from both ends of
the data: so few of them meet whatever affects a large part of a disk, wherever it begins, and what was done to either
end. A cluster that reads as zeros proves nothing, so none of those is kept.

The digests of clusters that have not changed pass from one backup to the next; the others are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from blake3 import blake3

from backupcore.disk.extents import CLUSTER
from backupcore.disk.nbd import Address, Client
from backupcore.disk.qcow2 import Layout

__all__ = ["Probe", "carried", "chosen", "digests", "failed", "places", "worth_keeping"]

Probe = tuple[int, str]
"""(offset, digest); see `backupcore.model.Disk`."""

_OCTAVES = 20
"""Distances from either end, in clusters: 0, 1, 2 to 3, 4 to 7 … up to 32 GiB, and what is beyond."""
_ZEROS = blake3(bytes(CLUSTER)).hexdigest()


def places(layout: Layout) -> list[int]:
    """The offsets of clusters of data at doubling distances from the first and from the last of them."""
    ranks = {distance for distance in (0, *(1 << octave for octave in range(_OCTAVES))) if distance < layout.clusters}
    ranks |= {layout.clusters - 1 - distance for distance in ranks}
    return [offset for rank in sorted(ranks) for offset, _ in layout.runs(rank, 1)]


def carried(probes: Iterable[Probe], layout: Layout) -> tuple[Probe, ...]:
    """Those of the parent's whose clusters have not changed, where `layout` is what has."""
    return tuple(probe for probe in probes if not layout.names(probe[0]))


def chosen(old: Iterable[int], new: Iterable[int]) -> list[int]:
    """Of these offsets one for each distance from the first and from the last, an old one if possible: it is the more
    likely to stay as it is.
    """
    kept = set(old)
    every = sorted(kept.union(new))
    found: dict[tuple[bool, int], int] = {}
    for offset in every:
        first, last = (offset - every[0]) // CLUSTER, (every[-1] - offset) // CLUSTER
        place = (first > last, min(min(first, last).bit_length(), _OCTAVES))
        if place not in found or (offset in kept and found[place] not in kept):
            found[place] = offset
    return sorted(found.values())


def digests(address: Address, offsets: Sequence[int], size: int) -> Mapping[int, str]:
    """What lies at these offsets of a disk of `size` bytes, as digests. No connection stays open."""
    buffers = {offset: bytearray(min(CLUSTER, size - offset)) for offset in offsets}
    with Client(address) as client:
        waiting = [client.submit(offset, buffer) for offset, buffer in buffers.items()]
        for reply in waiting:
            reply.result()
    return {offset: blake3(buffer).hexdigest() for offset, buffer in buffers.items()}


def failed(probes: Iterable[Probe], found: Mapping[int, str]) -> str:
    """Which of these reads otherwise now, as a reason; "" if none does."""
    for offset, digest in probes:
        if offset in found and found[offset] != digest:
            return (
                f"its cluster at byte {offset} reads otherwise than at the last backup, and nothing has recorded a "
                "write there: it is another disk, or something has written past what tracks it"
            )
    return ""


def worth_keeping(found: Mapping[int, str]) -> tuple[Probe, ...]:
    """These as probes: those that are not all zeros, in order."""
    return tuple((offset, digest) for offset, digest in sorted(found.items()) if digest != _ZEROS)
