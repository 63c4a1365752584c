"""A disk artifact that is hashed while it is read."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from backupcore.disk.ahead import AHEAD, ReadAhead
from backupcore.disk.table import CLUSTER, Table, digests
from backupcore.errors import IntegrityError

if TYPE_CHECKING:
    from pathlib import Path

    from backupcore.disk.ahead import Disk

__all__ = ["HashedDisk"]

_TOUCH = 0.05  # seconds between two moves of the table's counter of reads


class HashedDisk(ReadAhead):
    """The same bytes as the disk artifact, each cluster hashed into the table of sums as it passes.

    It is an eager `ReadAhead`: its readers write what they get, or wait for the kernel between their reads. When
    pickled it takes the disk's address and layout and the table's path along; both sides then fill the same table.

    The table is made at `table_path` if it does not exist. A read raises what the disk raises, IntegrityError where a
    cluster is no longer what it was when it was read before, and ContractViolation after `close`.
    """

    def __init__(self, disk: Disk, table_path: Path) -> None:
        super().__init__(disk, eager=True)
        clusters = self._layout.clusters
        self.table = Table.open(table_path) if table_path.exists() else Table.create(table_path, clusters)
        self._touched = 0.0

    def __reduce__(self) -> tuple[type[HashedDisk], tuple[Disk, Path]]:
        return HashedDisk, (self._disk, self.table.path)

    @property
    def bytes_read(self) -> int:
        """Bytes that were asked from the disk's data, by all processes: more than the data if some were read twice."""
        return self.table.bytes_read

    def read_into(self, offset: int, buffer: memoryview, *, ahead: bool = True) -> int:
        """`read_at` straight into `buffer`; without `ahead` nothing is read that was not asked for."""
        if offset < self.size and buffer:
            self._touch()
        return super().read_into(offset, buffer, ahead=ahead)

    def load(self, first: int, end: int) -> None:
        """Read up to four blocks of the clusters [first, end) that have no digest, so that they have one."""
        end = min(end, self._layout.clusters)
        wanted = []
        for number in range(self.block_of(first), self.block_of(end - 1) + 1 if end > first else 0):
            if self.table.first_missing(*self.clusters_of(number)) is not None:
                wanted.append(number)
            if len(wanted) == AHEAD:
                break
        self.fetch(wanted)

    def complete(self) -> None:
        """Read whatever has not been read yet, so that every cluster has its digest."""
        first = 0
        while (missing := self.table.first_missing(first, self._layout.clusters)) is not None:
            first = missing
            self.load(first, self._layout.clusters)

    def arrived(self, first: int, data: memoryview) -> None:
        """Hash blocks and record their digests."""
        asked = len(data)
        if first + asked // CLUSTER == self._layout.clusters:  # the last cluster may end past the guest's disk
            asked = sum(length for _, length in self._layout.runs(first, asked // CLUSTER))
        try:
            self.table.record(first, digests(data), asked)
        except IntegrityError as error:
            raise IntegrityError(f"{self.name}: {error.message}") from error

    def _touch(self) -> None:
        # The counter tells others that somebody reads; it need not count every read, and each costs system calls.
        now = time.monotonic()
        if now - self._touched > _TOUCH:
            self._touched = now
            self.table.touch()
