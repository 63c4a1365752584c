"""What an export says of its blocks: zeros, what is dirty, which image of a chain holds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from backupcore.disk.extents import Extent, Kind, coalesce, intersect

if TYPE_CHECKING:
    from backupcore.disk.nbd.client import Client

__all__ = ["ALLOCATION", "DEPTH", "allocation", "changes", "dirty", "held"]

ALLOCATION = "base:allocation"
"""The metadata context that tells holes and zeros from data."""

DEPTH = "qemu:allocation-depth"
"""The metadata context that tells which image of a chain holds a block: 0 none, 1 the top one, 2 the one below it."""

_STATE_ZERO = 2  # of base:allocation; NBD_STATE_HOLE (1) alone promises nothing about what a read gives
_STATE_DIRTY = 1  # of qemu:dirty-bitmap:*


def allocation(client: Client, offset: int, length: int) -> Iterator[Extent]:
    """The range as DATA and ZERO extents, without gaps, joined. The client needs the context `ALLOCATION`.

    ZERO is what the server promises to read as zeros; a hole without that promise is DATA.
    """
    return coalesce(
        Extent(start, size, Kind.ZERO if flags & _STATE_ZERO else Kind.DATA)
        for start, size, flags in _flags(client, ALLOCATION, offset, length)
    )


def dirty(client: Client, context: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """The (offset, length) of what is dirty by `context` (``qemu:dirty-bitmap:NAME``), joined."""
    marked = (
        Extent(start, size, Kind.DATA)
        for start, size, flags in _flags(client, context, offset, length)
        if flags & _STATE_DIRTY
    )
    return ((extent.offset, extent.length) for extent in coalesce(marked))


def held(client: Client, context: str, offset: int, length: int, *, most: int) -> Iterator[tuple[int, int]]:
    """The (offset, length) of what one of the `most` topmost images of a chain holds, by `context` (`DEPTH`), joined.

    A block that such an image holds as zeros counts: it hides what lies below.
    """
    within = (
        Extent(start, size, Kind.DATA)
        for start, size, depth in _flags(client, context, offset, length)
        if 1 <= depth <= most
    )
    return ((extent.offset, extent.length) for extent in coalesce(within))


def changes(client: Client, context: str, offset: int, length: int) -> Iterator[Extent]:
    """What is dirty in the range by `context`, as DATA and ZERO extents: all that an increment has to carry.

    Both contexts come with one walk. A dirty range that reads as zeros now is ZERO: it must be carried as
    zeros.
    """

    def pieces() -> Iterator[Extent]:
        for start, window in client.walk_status(offset, length):
            kinds, marks = window[ALLOCATION], window[context]
            if not any(flags & _STATE_DIRTY for _, flags in marks):
                continue
            yield from intersect(
                (
                    Extent(at, size, Kind.ZERO if flags & _STATE_ZERO else Kind.DATA)
                    for at, size, flags in _places(start, kinds)
                ),
                ((at, size) for at, size, flags in _places(start, marks) if flags & _STATE_DIRTY),
            )

    return coalesce(pieces())


def _flags(client: Client, context: str, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
    if context not in client.contexts:
        raise ValueError(f"the client was opened without the context {context!r}")
    for start, window in client.walk_status(offset, length):
        yield from _places(start, window[context])


def _places(start: int, entries: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    for size, flags in entries:
        yield start, size, flags
        start += size
