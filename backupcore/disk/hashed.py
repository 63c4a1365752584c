"""A disk artifact that is hashed while it is read."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
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
_TOUCH = 0.05  # seconds between two moves of the table's counter of reads


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

    def submit_clusters(self, first: int, count: int, buffer: memoryview) -> list[Any]: ...
    def close(self) -> None: ...


class _Block:
    """One block: asked for, under way, then either `data` or `error`.

    `spent` once a reader has had its last byte; `users` are copying from it, so its memory cannot be used again.
    """

    __slots__ = ("data", "error", "number", "spent", "users")

    def __init__(self, number: int) -> None:
        self.number = number
        self.data: memoryview | None = None
        self.error: BaseException | None = None
        self.spent = False
        self.users = 0


class HashedDisk(Artifact):
    """The same bytes as the disk artifact, each cluster hashed into the table of sums as it passes.

    The disk is read in blocks of 1 MiB by one thread, which has four requests under way and hashes what has come; that
    keeps the connection busy and costs fewer changes of thread than a pool. A few blocks stay in memory, so that
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
        self._changed = threading.Condition()  # guards all below
        self._cache: OrderedDict[int, _Block] = OrderedDict()
        self._wanted: deque[_Block] = deque()
        self._memory: list[memoryview] = []  # of blocks that were dropped: fresh memory costs a page fault per 4 KiB
        self._streams: deque[int] = deque(maxlen=_STREAMS)  # the next offset of each, the one last heard of at the end
        self._reader: threading.Thread | None = None
        self._touched = 0.0
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
        buffer = bytearray(max(0, min(length, self.size - offset)))
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """`read_at` straight into `buffer`."""
        end = min(offset + len(buffer), self.size)
        if end <= offset:
            return 0
        self._touch()
        start = self._layout.data_offset
        done = 0
        if offset < start:
            done = min(end, start) - offset
            buffer[:done] = self._layout.tables(offset, done)
        if end > start:
            self._copy(max(offset - start, 0), end - start, buffer[done:], ahead=self._is_sequential(offset, end))
        return end - offset

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
        with self._changed:
            for block in [self._want(number) for number in wanted]:
                self._wait(block)
                block.spent = True

    def complete(self) -> None:
        """Read whatever has not been read yet, so that every cluster has its digest."""
        first = 0
        while (missing := self.table.first_missing(first, self._layout.clusters)) is not None:
            first = missing
            self.load(first, self._layout.clusters)

    def close(self) -> None:
        """Let go of the connection and the thread, for good; reads that are under way fail. The table stays."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._disk.close()  # before the thread is awaited: it ends the read that the thread waits for
        if self._reader is not None:
            self._reader.join()
        with self._changed:
            self._cache.clear()
            self._memory.clear()

    def _touch(self) -> None:
        # The counter tells others that somebody reads; it need not count every read, and each costs system calls.
        now = time.monotonic()
        if now - self._touched > _TOUCH:
            self._touched = now
            self.table.touch()

    def _copy(self, at: int, end: int, buffer: memoryview, *, ahead: bool) -> None:
        """Copy the bytes [at, end) of the data; blocks of this read are fetched while the first is awaited."""
        last = (end - 1) // _BYTES
        for number in range(at // _BYTES, last + 1):
            through = number + AHEAD if ahead else min(number + AHEAD, last)
            with self._changed:
                block = self._want(number)
                for following in range(number + 1, min(through + 1, self._blocks)):
                    self._want(following)
                self._shrink()
                data = self._wait(block)
                block.users += 1
            from_, to = max(at - number * _BYTES, 0), min(end - number * _BYTES, len(data))
            buffer[: to - from_] = data[from_:to]
            buffer = buffer[to - from_ :]
            with self._changed:
                block.users -= 1
                block.spent = block.spent or to == len(data)

    def _want(self, number: int) -> _Block:
        """The block of that number, asked for if it is not here. Called with the lock."""
        if self._closed:
            raise ContractViolation(f"{self.name} was read after it was closed")
        block = self._cache.get(number)
        if block is None:
            block = self._cache[number] = _Block(number)
            self._wanted.append(block)
            if self._reader is None:
                self._reader = threading.Thread(target=self._run, name=f"read-{self.name}", daemon=True)
                self._reader.start()
            self._changed.notify_all()
        else:
            self._cache.move_to_end(number)
        return block

    def _wait(self, block: _Block) -> memoryview:
        """The data of a block, once they are there. Called with the lock, which it lets go of meanwhile."""
        while block.data is None:
            if block.error is not None:
                raise block.error
            if self._closed:
                raise ContractViolation(f"{self.name} was read while it was closed")
            self._changed.wait()
        return block.data

    def _shrink(self) -> None:
        """Drop blocks: those that were read to their end first. Called with the lock."""
        for most, any_ in ((_SPENT, False), (_MOST, True)):
            if len(self._cache) <= most:
                return
            for number, block in list(self._cache.items()):
                if len(self._cache) <= most:
                    break
                if block.data is not None and (block.spent or any_):
                    del self._cache[number]
                    if not block.users and len(block.data) == _BYTES and len(self._memory) < AHEAD:
                        self._memory.append(block.data)

    def _run(self) -> None:
        """Read what is wanted, in the order in which it was asked for; the thread's whole life."""
        under_way: deque[tuple[_Block, memoryview, list[Any]]] = deque()
        while True:
            with self._changed:
                while not (self._wanted or under_way or self._closed):
                    self._changed.wait()
                if self._closed:
                    return
                fresh = [self._wanted.popleft() for _ in range(min(len(self._wanted), AHEAD - len(under_way)))]
            for block in fresh:
                try:
                    under_way.append((block, *self._submit(block.number)))
                except BaseException as error:  # noqa: BLE001 - whoever waits for the block raises it
                    self._answer(block, error)
            if under_way:
                block, data, pending = under_way.popleft()
                try:
                    for part in pending:
                        part.result()
                    self._record(block.number, data)
                except BaseException as error:  # noqa: BLE001 - as above
                    self._answer(block, error)
                else:
                    self._answer(block, data)

    def _submit(self, number: int) -> tuple[memoryview, list[Any]]:
        first = number * BLOCK
        count = min(BLOCK, self._layout.clusters - first)
        with self._changed:
            whole = count == BLOCK and self._memory
            data = self._memory.pop() if whole else memoryview(bytearray(count * CLUSTER))
        return data, self._disk.submit_clusters(first, count, data)

    def _record(self, number: int, data: memoryview) -> None:
        first = number * BLOCK
        asked = len(data)
        if number == self._blocks - 1:  # the last cluster may end past the guest's disk
            asked = sum(length for _, length in self._layout.runs(first, asked // CLUSTER))
        try:
            self.table.record(first, digests(data), asked)
        except IntegrityError as error:
            raise IntegrityError(f"{self.name}: {error.message}") from error

    def _answer(self, block: _Block, answer: memoryview | BaseException) -> None:
        with self._changed:
            if isinstance(answer, memoryview):
                block.data = answer
            else:
                block.error = answer
                if self._cache.get(block.number) is block:
                    del self._cache[block.number]  # the next reader asks the disk again
            self._changed.notify_all()

    def _is_sequential(self, offset: int, end: int) -> bool:
        """Whether this read goes on where an earlier one ended, give or take one block (several may be in flight)."""
        with self._changed:
            for following in self._streams:
                if abs(offset - following) <= _BYTES:
                    self._streams.remove(following)
                    self._streams.append(max(end, following))
                    return True
            self._streams.append(end)
            return offset == 0
