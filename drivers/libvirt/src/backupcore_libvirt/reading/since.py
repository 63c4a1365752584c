"""What a bitmap says has not changed, as the disk reads now."""

from __future__ import annotations

from backupcore.disk.extents import Extent, ExtentTable, Kind, complement, intersect, to_clusters
from backupcore.disk.nbd import ALLOCATION, Address, Client, allocation, dirty

__all__ = ["unchanged_of"]


def unchanged_of(address: Address, bitmap: str) -> tuple[int, ExtentTable]:
    """The size of a disk, and all whole clusters of it that this bitmap does not mark. No connection stays open."""
    # Two connections, for the reason that `export` gives.
    context = f"qemu:dirty-bitmap:{bitmap}"
    with Client(address, [context]) as client:
        size = client.size
        marked = (Extent(offset, length, Kind.DATA) for offset, length in dirty(client, context, 0, size))
        changed = ExtentTable(to_clusters(marked, size))
    with Client(address, [ALLOCATION]) as client:
        return size, ExtentTable(to_clusters(intersect(allocation(client, 0, size), complement(changed, size)), size))
