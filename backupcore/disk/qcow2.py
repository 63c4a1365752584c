"""The qcow2 file of a disk, as a rule: every byte of it but the guest's own is known before the guest's disk is read.

The format is qcow2 version 3 as QEMU's ``docs/interop/qcow2.txt`` lays it down, and of all that it allows one form
only: clusters of 64 KiB, refcounts of 16 bits, no backing file, no features, no snapshots. In file order: header,
refcount table, refcount blocks, L1 table, L2 tables, then the data clusters in guest order. Every cluster of the file
is used once, so every refcount is 1. The number of data clusters and the virtual size fix all else, which is how the
reader (`backupcore.disk.stored`) can compare a file with what this module would have made.

An L2 entry is 0 for a cluster that the file says nothing of (reads as zeros in a full, as the parent in an
increment), 1 for a cluster of zeros, or the offset of a data cluster.

Sizes: QEMU counts disks in sectors of 512 bytes. It rounds the length of a raw file up, padding with zeros, but the
size in a qcow2 header down, dropping the guest's last bytes (tried with 7.2). So the header holds the size rounded up,
which is what the guest sees, and the tail of the last cluster is zeros.
"""

from __future__ import annotations

import abc
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from blake3 import blake3

from backupcore.disk.ahead import ReadAhead
from backupcore.disk.extents import CLUSTER, Extent, ExtentTable, Kind
from backupcore.disk.geometry import COPIED, ENTRIES, L2_SPAN, ZERO, Geometry, clusters_of, row
from backupcore.errors import HypervisorError
from backupcore.model import Artifact, stream

if TYPE_CHECKING:
    from backupcore.disk.reader import Reader

__all__ = ["CLUSTER", "BlockReader", "Blocks", "DiskArtifact", "Layout", "MemoryBlocks", "Pending", "Tables"]


class Tables(abc.ABC):
    """What the tables of every form have in common: header, refcounts, L1 and L2, in this order, before the data."""

    virtual_size: int
    data_offset: int
    _geometry: Geometry
    _l2: array[int]  # indexes of the L2 tables that exist
    _digest: bytes | None = None

    def tables(self, offset: int, length: int) -> bytes:
        """The bytes ``[offset, offset + length)`` of the file; ValueError past `data_offset`."""
        end = offset + length
        if not 0 <= offset <= end <= self.data_offset:
            raise ValueError(f"bytes {offset} to {end} of tables that end at {self.data_offset}")
        first = offset // CLUSTER
        whole = b"".join(self._cluster(index) for index in range(first, clusters_of(end)))
        return whole[offset - first * CLUSTER : end - first * CLUSTER]

    def tables_digest(self) -> bytes:
        """BLAKE3 (32 bytes) over all bytes before `data_offset`. Computed once: a second or so for each TiB."""
        if self._digest is None:
            hasher = blake3()
            for index in range(self.data_offset // CLUSTER):
                hasher.update(self._cluster(index))
            self._digest = hasher.digest()
        return self._digest

    def _cluster(self, index: int) -> bytes:
        place = self._geometry
        if index == 0:
            return place.header()
        if index < place.first_block:
            return place.refcount_table_cluster(index - 1)
        if index < place.l1:
            return self._refcount_block(index - place.first_block)
        if index < place.l2:
            return self._l1_cluster(index - place.l1)
        return self._l2_table(self._l2[index - place.l2])

    def _l1_cluster(self, index: int) -> bytes:
        entries = bytearray(CLUSTER)
        first = index * ENTRIES
        low = bisect_left(self._l2, first)
        for position in range(low, bisect_left(self._l2, first + ENTRIES, low)):
            at = (self._l2[position] - first) * 8
            entries[at : at + 8] = row(COPIED | (self._geometry.l2 + position) * CLUSTER, 1)
        return bytes(entries)

    def _refcount_block(self, index: int) -> bytes:
        return self._geometry.refcount_block(index)

    @abc.abstractmethod
    def _l2_table(self, index: int) -> bytes:
        """The L2 table of the guest's bytes from ``index * L2_SPAN`` on."""


class Layout(Tables):
    """The qcow2 file that holds these extents of a disk, computed before any of its data is read.

    `extents` are sorted, disjoint and made of whole clusters (`backupcore.disk.extents.to_clusters`); the last one may
    end past `virtual_size`. DATA becomes data clusters, ZERO becomes explicit zero clusters, what is not listed stays
    unallocated. ValueError for anything else; UnsupportedOperation for a disk too large for qcow2.

    `virtual_size` is the disk's size as given; `size` the file's length, always whole clusters; `data_offset` where the
    data clusters begin; `clusters` how many there are, in guest order. Immutable, may be shared by threads, and pickles
    small: memory goes by the number of extents (about 25 bytes each), not by clusters.
    """

    def __init__(self, virtual_size: int, extents: Iterable[Extent]) -> None:
        self._extents = ExtentTable(extents)
        self._before = array("Q", [0])  # data clusters before each extent, and before the end
        self._l2 = array("I")  # indexes of the L2 tables that exist
        limit = clusters_of(virtual_size) * CLUSTER
        data = 0
        last = -1
        for offset, length, kind in self._extents:
            if offset % CLUSTER or length % CLUSTER or offset + length > limit:
                raise ValueError(f"{length} bytes at {offset} are no whole clusters of a disk of {virtual_size} bytes")
            if kind is Kind.DATA:
                data += length // CLUSTER
            self._before.append(data)
            final = (offset + length - 1) // L2_SPAN
            self._l2.extend(range(max(last + 1, offset // L2_SPAN), final + 1))
            last = final
        self._geometry = Geometry.around(virtual_size, len(self._l2) + data)
        self.virtual_size = virtual_size
        self.clusters = data
        self.size = self._geometry.clusters * CLUSTER
        self.data_offset = self.size - data * CLUSTER

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layout):
            return NotImplemented
        return self.virtual_size == other.virtual_size and self._extents == other._extents

    __hash__ = None  # type: ignore[assignment]  # compared by content, which is too much to hash

    def __repr__(self) -> str:
        return f"<Layout of {self.virtual_size} bytes with {self.clusters} data clusters>"

    def extents(self) -> Iterator[Extent]:
        """The extents, neighbours of one kind joined."""
        return iter(self._extents)

    def names(self, offset: int) -> bool:
        """Whether the file says anything of the guest's byte at `offset`, data or zeros."""
        return self._extents.at(offset) is not None

    def index(self, offset: int) -> int:
        """The number of data clusters before the guest offset: the index, in file order, of one that lies there."""
        place = self._extents.index_at(offset)
        if place == len(self._extents):
            return self.clusters
        extent = self._extents[place]
        if extent.offset >= offset or extent.kind is Kind.ZERO:
            return self._before[place]
        return self._before[place] + (offset - extent.offset) // CLUSTER

    def places(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(guest offset, index of its data cluster in the file, clusters) of the data in a range of whole clusters."""
        for start, size, kind in self._extents.within(offset, length):
            if kind is Kind.DATA:
                yield start, self.index(start), size // CLUSTER

    def runs(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """(guest offset, bytes) of the data clusters ``[first, first + count)``, in file order, neighbours joined.

        The last run of the disk is cut at `virtual_size`. ValueError for clusters that do not exist.
        """
        if first < 0 or count < 0 or first + count > self.clusters:
            raise ValueError(f"clusters {first} to {first + count} of {self.clusters}")
        end = first + count
        # Zero extents add no clusters; bisecting to the right skips those that stand before the data.
        place = bisect_right(self._before, first) - 1
        while first < end:
            extent = self._extents[place]
            if extent.kind is Kind.DATA:
                offset = extent.offset + (first - self._before[place]) * CLUSTER
                stop = min(end, self._before[place + 1])
                yield offset, min((stop - first) * CLUSTER, self.virtual_size - offset)
                first = stop
            place += 1

    def _l2_table(self, index: int) -> bytes:
        start = index * L2_SPAN
        entries = bytearray(CLUSTER)
        target = COPIED | (self.data_offset + self.index(start) * CLUSTER)
        for offset, length, kind in self._extents.within(start, L2_SPAN):
            low, count = (offset - start) // CLUSTER * 8, length // CLUSTER
            if kind is Kind.ZERO:
                entries[low : low + count * 8] = ZERO.to_bytes(8, "big") * count
            else:
                entries[low : low + count * 8] = row(target, count)
                target += length
        return bytes(entries)


class Pending(Protocol):
    """A read under way; `backupcore.disk.nbd.Pending` is one."""

    def result(self) -> None:
        """Return once the buffer is filled, or raise what ended the read."""


class BlockReader(Protocol):
    """An open connection to a guest's disk; `backupcore.disk.nbd.Client` is one. Its methods may run in any threads."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on, or raise."""

    def submit(self, offset: int, buffer: memoryview) -> Pending:
        """Begin to fill `buffer` with the bytes from `offset` on; it is the reader's until the result is there."""

    def close(self) -> None:
        """End the connection; reads that wait end with an error."""


class Blocks(Protocol):
    """Where the bytes of a guest's disk come from: an address that can be pickled, without an open connection."""

    def connect(self) -> BlockReader:
        """A new connection."""


class _Later:
    """A read that is done when its result is asked for."""

    def __init__(self, reader: MemoryBlocks, offset: int, buffer: memoryview) -> None:
        self._read = reader, offset, buffer

    def result(self) -> None:
        reader, offset, buffer = self._read
        reader.read_into(offset, buffer)


class MemoryBlocks:
    """A disk that lies in memory: for tests, and for very small disks. It is its own connection."""

    def __init__(self, data: bytes | bytearray) -> None:
        self._data = data

    def connect(self) -> MemoryBlocks:
        """This object."""
        return self

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Copy the bytes from `offset` on; ValueError outside of the disk, as an NBD client does."""
        end = offset + len(buffer)
        if not 0 <= offset <= end <= len(self._data):
            raise ValueError(f"bytes {offset} to {end} of a disk of {len(self._data)} bytes")
        buffer[:] = memoryview(self._data)[offset:end]

    def submit(self, offset: int, buffer: memoryview) -> Pending:
        """`read_into`, once the result is asked for."""
        return _Later(self, offset, buffer)

    def close(self) -> None:
        """Nothing to let go of."""


class DiskArtifact(Artifact):
    """The qcow2 file of one disk: tables from the layout, data from the guest's disk as they are read.

    Any threads may read; they share one connection, made at the first read of data. Pickles as addresses and tables.
    Errors of the connection pass through unchanged (HypervisorError). `reader` is the process that shall read this disk
    for a backup (`backupcore.bundle`), None for this one.
    """

    def __init__(self, name: str, layout: Layout, blocks: Blocks, *, reader: Reader | None = None) -> None:
        self.name = name
        self.size = layout.size
        self.layout = layout
        self.reader = reader
        self._blocks = blocks
        self._lock = threading.Lock()
        self._reader: BlockReader | None = None
        self._closed = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_reader": None, "reader": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def open(self) -> BinaryIO:
        """A stream of the whole file, which reads ahead."""
        return stream(ReadAhead(self))

    def read_at(self, offset: int, length: int) -> bytes:
        """The bytes from `offset` on, at most `length`; fewer at the end of the file only."""
        if offset < 0 or length < 0:
            raise ValueError(f"{length} bytes at {offset}")
        end = min(offset + length, self.size)
        start = self.layout.data_offset
        tables = self.layout.tables(offset, min(end, start) - offset) if offset < start else b""
        offset += len(tables)
        if offset >= end:
            return tables
        first = (offset - start) // CLUSTER
        count = clusters_of(end - start) - first
        buffer = bytearray(count * CLUSTER)
        self.read_clusters(first, count, memoryview(buffer))
        skip = offset - start - first * CLUSTER
        return tables + memoryview(buffer)[skip : skip + end - offset]

    def read_clusters(self, first: int, count: int, buffer: memoryview) -> None:
        """Read the data clusters ``[first, first + count)`` into `buffer`, whose length is ``count * CLUSTER``.

        What lies past the end of the disk in its last cluster is zeros.
        """
        for pending in self.submit_clusters(first, count, buffer):
            pending.result()

    def submit_clusters(self, first: int, count: int, buffer: memoryview) -> list[Pending]:
        """Begin to read as `read_clusters` does: `buffer` is filled when all results are there."""
        if len(buffer) != count * CLUSTER:
            raise ValueError(f"a buffer of {len(buffer)} bytes for {count} clusters")
        reader = self._connection()
        done = 0
        under_way = []
        for offset, length in self.layout.runs(first, count):
            under_way.append(reader.submit(offset, buffer[done : done + length]))
            done += length
        buffer[done:] = bytes(len(buffer) - done)
        return under_way

    def close(self) -> None:
        """End the connection, for ever: it waits for one that is being made, and no further one can be made.

        A backup job that is aborted while an NBD client connects hangs the guest, so when this returns there is
        none, and never will be, in this process. Copies made by pickling have connections of their own.
        """
        with self._lock:
            self._closed = True
            reader, self._reader = self._reader, None
            if reader is not None:
                reader.close()

    def _connection(self) -> BlockReader:
        # Connecting under the lock is what lets close() wait for it.
        with self._lock:
            if self._closed:
                raise HypervisorError(f"{self.name} was read after its disk had been released")
            if self._reader is None:
                self._reader = self._blocks.connect()
            return self._reader
