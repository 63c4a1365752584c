"""A disk artifact that is hashed while it is read."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from backupcore.disk.table import CLUSTER, Table, digests
from backupcore.errors import ContractViolation, IntegrityError
from backupcore.model import Artifact, stream

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["HashedDisk"]

BLOCK = 16
"""Data clusters that are read from the disk at once: 1 MiB."""

AHEAD = 4
"""Blocks that are read ahead of a sequential reader: what keeps one NBD connection busy."""

_BYTES = BLOCK * CLUSTER
_SPENT = 8  # blocks kept while any of them has been read to its end
_MOST = 32  # blocks kept at most: several readers at different places
_STREAMS = 8  # sequential readers that are told apart


class _Layout(Protocol):
    """What is needed of `qcow2.Layout`."""

    size: int
    data_offset: int
    clusters: int

    def tables(self, offset: int, length: int) -> bytes: ...
    def runs(self, first: int, count: int) -> Iterator[tuple[int, int]]: ...


class _Disk(Protocol):
    """What is needed of `qcow2.DiskArtifact`."""

    name: str
    layout: Any

    def read_clusters(self, first: int, count: int, buffer: memoryview) -> None: ...
    def close(self) -> None: ...


class _Block:
    """One block, read or being read. `spent` once a reader has had its last byte."""

    __slots__ = ("future", "spent")

    def __init__(self, future: Future[memoryview]) -> None:
        self.future = future
        self.spent = False


class HashedDisk(Artifact):
    """The same bytes as the disk artifact, each cluster hashed into the table of sums as it passes.

    The disk is read in blocks of 1 MiB, four of them ahead of a sequential reader, and a few stay in memory, so that
    small and unaligned reads do not read the disk twice. Safe from several threads, at different places at once. When
    pickled it takes the disk's address and layout and the table's path along; both sides then fill the same table.

    The table is made at `table_path` if it does not exist. A read raises what the disk raises, IntegrityError where a
    cluster is no longer what it was when it was read before, and ContractViolation after `close`.
    """

    def __init__(self, disk: _Disk, table_path: Path) -> None:
        self._disk = disk
        self._layout: _Layout = disk.layout
        self.name = disk.name
        self.size = self._layout.size
        self.table = Table.open(table_path) if table_path.exists() else Table.create(table_path, self._layout.clusters)
        self._blocks = -(-self._layout.clusters // BLOCK)
        self._lock = threading.Lock()
        self._cache: OrderedDict[int, _Block] = OrderedDict()
        self._streams: deque[int] = deque(maxlen=_STREAMS)  # the next offset of each, the one last heard of at the end
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False

    def __reduce__(self) -> tuple[type[HashedDisk], tuple[_Disk, Path]]:
        return HashedDisk, (self._disk, self.table.path)

    @property
    def bytes_read(self) -> int:
        """Bytes that were asked from the disk's data, by all processes: more than the data if some were read twice."""
        return self.table.bytes_read

    def open(self) -> BinaryIO:
        """The artifact from byte 0."""
        return stream(self)

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`, or what is left before `size`."""
        if offset < 0:
            raise ValueError(f"{length} bytes at {offset}")
        end = min(offset + length, self.size)
        if end <= offset:
            return b""
        self.table.touch()
        pieces: list[bytes | memoryview] = []
        start = self._layout.data_offset
        if offset < start:
            pieces.append(self._layout.tables(offset, min(end, start) - offset))
        if end > start:
            pieces.extend(self._data(max(offset - start, 0), end - start, ahead=self._is_sequential(offset, end)))
        return b"".join(pieces)

    def load(self, first: int, end: int) -> None:
        """Read up to four blocks of the clusters [first, end) that have no digest, so that they have one."""
        last = -(-min(end, self._layout.clusters) // BLOCK)
        wanted = []
        for number in range(first // BLOCK, last):
            from_, to = number * BLOCK, min((number + 1) * BLOCK, self._layout.clusters)
            if self.table.first_missing(from_, to) is not None:
                wanted.append(number)
            if len(wanted) == AHEAD:
                break
        with self._lock:
            blocks = [self._want(number) for number in wanted]
            self._shrink()
        for block in blocks:
            self._wait(block)
            block.spent = True

    def complete(self) -> None:
        """Read whatever has not been read yet, so that every cluster has its digest."""
        first = 0
        while (missing := self.table.first_missing(first, self._layout.clusters)) is not None:
            first = missing
            self.load(first, self._layout.clusters)

    def close(self) -> None:
        """Let go of the connection and the threads, for good; reads that are under way fail. The table stays."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
        if pool:
            pool.shutdown(wait=False, cancel_futures=True)
        self._disk.close()  # before the threads are awaited: it ends the reads that they wait for
        if pool:
            pool.shutdown(wait=True)
        with self._lock:
            self._cache.clear()

    def _data(self, at: int, end: int, *, ahead: bool) -> Iterator[memoryview]:
        """The bytes [at, end) of the data, in pieces; blocks of this read are fetched while the first is awaited."""
        last = (end - 1) // _BYTES
        for number in range(at // _BYTES, last + 1):
            through = number + AHEAD if ahead else min(number + AHEAD, last)
            with self._lock:
                block = self._want(number)
                for following in range(number + 1, min(through + 1, self._blocks)):
                    self._want(following)
                self._shrink()
            data = self._wait(block)
            from_, to = max(at - number * _BYTES, 0), min(end - number * _BYTES, len(data))
            block.spent = block.spent or to == len(data)
            yield data[from_:to]

    def _want(self, number: int) -> _Block:
        """The block of that number, asked for if it is not here. Called with the lock."""
        if self._closed:
            raise ContractViolation(f"{self.name} was read after it was closed")
        block = self._cache.get(number)
        if block is None or (block.future.done() and block.future.exception()):
            if self._pool is None:
                self._pool = ThreadPoolExecutor(AHEAD, thread_name_prefix=f"read-{self.name}")
            block = self._cache[number] = _Block(self._pool.submit(self._read, number))
        else:
            self._cache.move_to_end(number)
        return block

    def _wait(self, block: _Block) -> memoryview:
        try:
            return block.future.result()
        except CancelledError:
            raise ContractViolation(f"{self.name} was read while it was closed") from None

    def _shrink(self) -> None:
        """Drop blocks: those that were read to their end first. Called with the lock."""
        for most, any_ in ((_SPENT, False), (_MOST, True)):
            for number in [n for n, block in self._cache.items() if block.future.done() and (block.spent or any_)]:
                if len(self._cache) <= most:
                    break
                del self._cache[number]

    def _read(self, number: int) -> memoryview:
        """Read one block from the disk and record its digests; runs in the pool."""
        first = number * BLOCK
        count = min(BLOCK, self._layout.clusters - first)
        data = memoryview(bytearray(count * CLUSTER))
        self._disk.read_clusters(first, count, data)
        asked = len(data)
        if number == self._blocks - 1:  # the last cluster may end past the guest's disk
            asked = sum(length for _, length in self._layout.runs(first, count))
        try:
            self.table.record(first, digests(data), asked)
        except IntegrityError as error:
            raise IntegrityError(f"{self.name}: {error.message}") from error
        return data.toreadonly()

    def _is_sequential(self, offset: int, end: int) -> bool:
        """Whether this read goes on where an earlier one ended, give or take one block (several may be in flight)."""
        with self._lock:
            for following in self._streams:
                if abs(offset - following) <= _BYTES:
                    self._streams.remove(following)
                    self._streams.append(max(end, following))
                    return True
            self._streams.append(end)
            return offset == 0
