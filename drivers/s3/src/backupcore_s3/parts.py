"""How an object is cut into parts, and how many bytes of them lie in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from backupcore.errors import UnsupportedOperation

__all__ = ["LARGEST", "LEAST", "MOST", "Cut"]

MiB = 1 << 20

LEAST = 5 * MiB
"""A part is at least so large, but for the last one: S3's limit."""

MOST = 10_000
"""Parts of one object at most: S3's limit."""

LARGEST = 5 << 40
"""Bytes of one object at most: what every S3 server that is in use takes."""

_USUAL = 16 * MiB
_SMALL = 8 * MiB
_MEMORY = 128 * MiB  # for parts on their way; with Python and boto3 the process stays under 300 MiB
_IN_MEMORY = 64 * MiB  # parts up to here: at least two of them fit


@dataclass(frozen=True, slots=True)
class Cut:
    """The parts of an object of `size` bytes: `part` bytes each, `workers` of them sent at once.

    `in_memory` parts are read from the artifact once, whatever has to be sent again, and get a checksum beforehand. An
    object of over 625 GiB has parts for which there is no such room: they are read as they are sent.
    """

    size: int
    part: int
    workers: int
    in_memory: bool

    @classmethod
    def of(cls, name: str, size: int, concurrency: int) -> Cut:
        """The cut for an object; UnsupportedOperation if it is too large for S3."""
        if size > LARGEST:
            raise UnsupportedOperation(
                f"{name} has {size} bytes; an object of S3 has {LARGEST} at most",
                "Spread the VM's data over several disks, or use another datastore.",
            )
        usual = max(_SMALL, min(_USUAL, _MEMORY // concurrency // MiB * MiB))
        part = max(usual, -(-size // MOST // MiB) * MiB)
        in_memory = part <= _IN_MEMORY
        return cls(size, part, min(concurrency, _MEMORY // part) if in_memory else concurrency, in_memory)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """(number, offset, length) of each part; numbers begin at 1."""
        for number, offset in enumerate(range(0, self.size, self.part), 1):
            yield number, offset, min(self.part, self.size - offset)
