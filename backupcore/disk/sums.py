"""Digests per cluster: the ``sums.*`` artifact beside each disk.

The sums of a disk are the 32-byte BLAKE3 of each of its data clusters (64 KiB, the last one padded with zeros as it
stands in the file), in file order: 0.05 % of the data. They are made while a disk is read for a backup, in whatever
order, and let a restore check every cluster that it uses without reading those that it does not use.
"""

from __future__ import annotations

import time
from typing import BinaryIO

from backupcore.disk.hashed import HashedDisk
from backupcore.disk.table import CLUSTER, DIGEST, Table, digests
from backupcore.errors import IntegrityError
from backupcore.model import Artifact, stream

__all__ = ["CLUSTER", "DIGEST", "Checker", "HashedDisk", "SumsArtifact", "Table", "digests"]

_POLL = 0.02  # seconds between two looks at the counters, which another process may move


class SumsArtifact(Artifact):
    """The sums of one disk, as they come into being while the disk artifact is read.

    A read waits for the digests that it covers while somebody else reads the disk: a second reading would load the
    guest's disk twice. When the disk has not moved for `patience` seconds (ten times as long once somebody has begun
    to read it: an uplink may pause), the read takes from the disk what is missing itself. So every order of reading
    the artifacts of a backup comes to an end, also one file at a time.
    """

    def __init__(self, name: str, disk: HashedDisk, *, patience: float = 1.0) -> None:
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


class Checker:
    """Checks clusters as they come back from a store against the sums of their disk.

    `sums` is a sequential stream of the sums artifact, which the caller has checked against the digest in the
    manifest, or checks as it passes. `name` is the disk artifact's name, for messages. Clusters are checked in
    ascending order; those that are not needed are passed over. Memory: the digests of one run.
    """

    def __init__(self, sums: BinaryIO, name: str) -> None:
        self._sums = sums
        self._name = name
        self._next = 0

    def check(self, first: int, buffer: memoryview) -> None:
        """Check the clusters `first`, `first` + 1, ... that `buffer` holds (whole clusters).

        Raises IntegrityError, naming the disk and the first cluster that differs, or that the sums do not cover.
        """
        if first < self._next:
            raise ValueError(f"cluster {first} after cluster {self._next - 1}: the sums are read forward only")
        found = digests(buffer)
        self._pass_over((first - self._next) * DIGEST)
        expected = self._read(len(found))
        self._next = first + len(found) // DIGEST
        if found == expected:
            return
        for at in range(0, len(found), DIGEST):
            if found[at : at + DIGEST] != expected[at : at + DIGEST]:
                number = first + at // DIGEST
                what = "its sums end before it" if at + DIGEST > len(expected) else "its digest is not that of its sums"
                raise IntegrityError(
                    f"{self._name}: data cluster {number} is damaged: {what}",
                    "Restore from another increment or another datastore.",
                )

    def _pass_over(self, count: int) -> None:
        while count > 0:
            piece = self._sums.read(min(count, 1 << 20))
            if not piece:
                return
            count -= len(piece)

    def _read(self, count: int) -> bytes:
        pieces = bytearray()
        while len(pieces) < count:
            piece = self._sums.read(count - len(pieces))
            if not piece:
                break
            pieces += piece
        return bytes(pieces)
