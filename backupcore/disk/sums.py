"""Digests per cluster: the ``sums.*`` artifact beside each disk.

The sums of a disk are the 32-byte BLAKE3 of each of its data clusters (64 KiB, the last one padded with zeros as it
stands in the file), in file order: 0.05 % of the data. They are made while a disk is read for a backup, in whatever
order, and let a restore check every cluster that it uses without reading those that it does not use.
"""

from __future__ import annotations

import time
from typing import BinaryIO, Protocol

from backupcore.disk.hashed import HashedDisk
from backupcore.disk.table import CLUSTER, DIGEST, Table, digests
from backupcore.model import Artifact, stream

__all__ = ["CLUSTER", "DIGEST", "HashedDisk", "SumsArtifact", "Table", "digests"]


class Hashed(Protocol):
    """What is needed of a disk that is hashed while it is read: `HashedDisk` is one."""

    table: Table

    def load(self, first: int, end: int) -> None:
        """Read some of the clusters [first, end) that have no digest, so that they have one."""


_POLL = 0.02  # seconds between two looks at the counters, which another process may move


class SumsArtifact(Artifact):
    """The sums of one disk, as they come into being while the disk artifact is read.

    A read waits for the digests that it covers while somebody else reads the disk: a second reading would load the
    guest's disk twice. When the disk has not moved for `patience` seconds (ten times as long once somebody has begun
    to read it: an uplink may pause), the read takes from the disk what is missing itself. So every order of reading
    the artifacts of a backup comes to an end, also one file at a time.
    """

    def __init__(self, name: str, disk: Hashed, *, patience: float = 1.0) -> None:
        self.name = name
        self.size = disk.table.clusters * DIGEST
        self._disk = disk
        self._patience = patience
        self._alone_at = -1  # the disk's counter of reads when this reader lost patience

    def open(self) -> BinaryIO:
        """The digests from byte 0."""
        return stream(self)

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes, or what is left; waits as the class says."""
        end = min(offset + length, self.size)
        if end <= offset:
            return b""
        first, last = offset // DIGEST, -(-end // DIGEST)
        self._have(first, last)
        found = self._disk.table.read(first, last - first)
        return found[offset - first * DIGEST : end - first * DIGEST]

    def digest(self) -> bytes:
        """BLAKE3 over the whole artifact; waits as a read does."""
        self._have(0, self._disk.table.clusters)
        return self._disk.table.digest()

    def _have(self, first: int, end: int) -> None:
        """Return when the clusters [first, end) have digests."""
        table = self._disk.table
        seen = (-1, -1)
        since = time.monotonic()
        while (missing := table.first_missing(first, end)) is not None:
            first = missing
            moved = (table.reads, table.bytes_read)
            if table.reads == self._alone_at:
                self._disk.load(first, end)
            elif moved != seen:
                seen = moved
                since = time.monotonic()
            elif time.monotonic() - since >= self._patience * (10 if table.reads else 1):
                self._alone_at = table.reads
            else:
                table.wait(min(_POLL, self._patience / 4))
