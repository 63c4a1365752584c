"""A restored disk: a qcow2 file that is written as its clusters come, in any order.

Clusters and L2 tables are appended as they are needed. The L2 tables that were used last are in memory, 8 MiB at most,
the others in the file, so beyond that memory goes by the L1 table (16 KiB for each TiB). L1 table and refcounts follow
at the end, the header last: before that the file starts with zeros, and nothing takes it for a disk.
"""

from __future__ import annotations

import errno
import os
import struct
from array import array
from pathlib import Path
from types import TracebackType
from typing import Self

from backupcore.disk.extents import CLUSTER
from backupcore.disk.geometry import COPIED, ENTRIES, L2_SPAN, Geometry, clusters_of, header, row, table
from backupcore.disk.output import Output
from backupcore.errors import from_os_error

__all__ = ["DiskWriter"]

_KEPT = 128
"""L2 tables in memory. A chain's data come in many small places, whose entries would be a read and a write for each."""


class DiskWriter:
    """Writes one new qcow2 v3 file without a backing file; sparse, since what is never written takes no room.

    `target` is a path, which must not exist yet (mode 0600), or the descriptor of an empty file opened for reading and
    writing, which stays the caller's. Not for several threads at once. Errors: TargetFull, AccessDenied and so on, as
    `backupcore.errors.from_os_error` sorts them; after one the file is of no use and the caller removes it.
    """

    def __init__(self, target: Path | int, virtual_size: int) -> None:
        self.virtual_size = virtual_size
        self._geometry = Geometry.around(virtual_size, 0)  # refuses sizes that cannot be
        self._tables = array("Q", bytes(8 * self._geometry.l1_entries))  # file cluster of each L2 table; 0: none yet
        self._kept: dict[int, bytearray] = {}  # those in memory, the one used last at the end
        self._end = 1  # the next free cluster of the file; the header is the first
        self._name = f"file descriptor {target}" if isinstance(target, int) else str(target)
        self._owned = not isinstance(target, int)
        self._finished = False
        try:
            self._fd = target if isinstance(target, int) else os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            length = os.fstat(self._fd).st_size
        except OSError as error:
            raise from_os_error(error, f"creating {self._name}") from error
        if length:
            raise ValueError(f"{self._name} holds {length} bytes already")
        self._output = Output(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, offset: int, data: memoryview) -> None:
        """Put `data` at the guest offset.

        `offset` is a cluster's start; `data` end with a cluster or at `virtual_size`. A cluster can be written once
        (ValueError), so that nothing in the file is used without being reachable.
        """
        self._check(offset, len(data))
        try:
            self._write(offset, data)
        except OSError as error:
            raise from_os_error(error, f"writing {self._name}") from error

    def zero(self, offset: int, length: int) -> None:
        """Let the range, which was never written, read as zeros: in a new file it does."""
        self._check(offset, length)

    def finish(self) -> None:
        """Write the tables, then the header; when this returns the file is complete and on stable storage.

        Its entry in the directory is the caller's to sync, who may yet give it another name.
        """
        if self._finished:
            return
        try:
            self._finish()
        except OSError as error:
            raise from_os_error(error, f"writing {self._name}") from error
        self._finished = True

    def close(self) -> None:
        """Close the file if it was opened here. Without `finish` it is no disk."""
        self._output.close()
        if self._owned:
            self._owned = False
            os.close(self._fd)

    def _check(self, offset: int, length: int) -> None:
        end = offset + length
        if (
            offset % CLUSTER
            or not 0 <= offset < end <= self.virtual_size
            or (end % CLUSTER and end < self.virtual_size)
        ):
            raise ValueError(f"{length} bytes at {offset} are no whole clusters of a disk of {self.virtual_size} bytes")

    def _write(self, offset: int, data: memoryview) -> None:
        end = offset + clusters_of(len(data)) * CLUSTER
        parts = []  # (L2 table, its first entry, entries)
        for index in range(offset // L2_SPAN, (end - 1) // L2_SPAN + 1):
            low, high = max(offset, index * L2_SPAN), min(end, (index + 1) * L2_SPAN)
            first, count = low // CLUSTER % ENTRIES, (high - low) // CLUSTER
            if any(self._l2(index)[first * 8 : (first + count) * 8]):
                raise ValueError(f"clusters of {end - offset} bytes at {offset} are there already")
            parts.append((index, first, count))
        target = place = self._end * CLUSTER
        for index, first, count in parts:
            self._l2(index)[first * 8 : (first + count) * 8] = row(COPIED | target, count)
            target += count * CLUSTER
        self._output.write(place, data)
        self._end = target // CLUSTER

    def _l2(self, index: int) -> bytearray:
        """An L2 table, to be changed before the next one is asked for."""
        found = self._kept.pop(index, None)
        if found is None:
            if len(self._kept) == _KEPT:
                oldest = next(iter(self._kept))
                self._put(self._tables[oldest] * CLUSTER, self._kept[oldest])
                del self._kept[oldest]  # not before it is in the file: a full one must not lose entries
            if self._tables[index]:
                found = bytearray(os.pread(self._fd, CLUSTER, self._tables[index] * CLUSTER))
                if len(found) != CLUSTER:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
            else:
                found = bytearray(CLUSTER)
                self._tables[index] = self._end
                self._end += 1
        self._kept[index] = found
        return found

    def _finish(self) -> None:
        for index, kept in self._kept.items():
            self._put(self._tables[index] * CLUSTER, kept)
        l1 = self._end
        blocks = l1 + clusters_of(self._geometry.l1_entries * 8)  # ... of refcounts, with their table behind them
        place = Geometry.around(self.virtual_size, self._end - 1)  # how many; the places differ from a layout's
        refcount_table = blocks + place.refcount_blocks
        entries = (COPIED | cluster * CLUSTER if cluster else 0 for cluster in self._tables)
        self._put(l1 * CLUSTER, struct.pack(f">{len(self._tables)}Q", *entries))
        for index in range(place.refcount_blocks):
            self._put((blocks + index) * CLUSTER, place.refcount_block(index))
        for index in range(place.refcount_table):
            self._put(
                (refcount_table + index) * CLUSTER, table(blocks * CLUSTER, index * ENTRIES, place.refcount_blocks)
            )
        # Twice: a header that outlives a power cut must not stand before data that did not.
        os.fsync(self._fd)
        first = header(
            self.virtual_size,
            l1_offset=l1 * CLUSTER,
            refcount_table_offset=refcount_table * CLUSTER,
            refcount_table_clusters=place.refcount_table,
        )
        self._put(0, first)
        os.fsync(self._fd)

    def _put(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        left = memoryview(data)
        while left:
            done = os.pwrite(self._fd, left, offset)
            offset += done
            left = left[done:]
