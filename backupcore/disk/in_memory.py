"""Small disks that lie in memory, as qcow2 files."""

from __future__ import annotations

from backupcore.disk.extents import CLUSTER, Extent, Kind
from backupcore.disk.qcow2 import DiskArtifact, Layout, MemoryBlocks

__all__ = ["as_qcow2"]


def as_qcow2(data: bytes) -> bytes:
    """A qcow2 file that holds these bytes, all of them, and lies on nothing."""
    extents = [Extent(0, -(-len(data) // CLUSTER) * CLUSTER, Kind.DATA)]
    with DiskArtifact("memory", Layout(len(data), extents), MemoryBlocks(data)).open() as stream:
        return stream.read()
