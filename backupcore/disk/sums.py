"""Digests per cluster: the ``sums.*`` artifact beside each disk.

The sums of a disk are the 32-byte BLAKE3 of each of its data clusters (64 KiB, the last one padded with zeros as it
stands in the file), in file order: 0.05 % of the data. They are made while a disk is read for a backup, in whatever
order, and let a restore check every cluster that it uses without reading those that it does not use.
"""

from __future__ import annotations

from typing import BinaryIO

from blake3 import blake3

from backupcore.errors import IntegrityError

__all__ = ["CLUSTER", "DIGEST", "Checker", "digests"]

CLUSTER = 65536
"""Bytes of one data cluster."""

DIGEST = 32
"""Bytes of one digest (BLAKE3-256)."""


def digests(buffer: memoryview) -> bytes:
    """The digests of the clusters in `buffer` (whole clusters of 64 KiB), joined in order."""
    if len(buffer) % CLUSTER:
        raise ValueError(f"{len(buffer)} bytes are no whole clusters of {CLUSTER}")
    return b"".join(blake3(buffer[at : at + CLUSTER]).digest() for at in range(0, len(buffer), CLUSTER))


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
