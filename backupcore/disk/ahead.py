"""Reading a disk artifact ahead of whoever reads it forwards."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from backupcore.disk.extents import CLUSTER
from backupcore.errors import ContractViolation
from backupcore.model import Artifact, stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["AHEAD", "BLOCK", "Coming", "ReadAhead"]

BLOCK = 16
"""Data clusters that are read from the disk at once: 1 MiB."""

AHEAD = 4
"""Blocks that are asked for ahead of a sequential reader: what keeps one NBD connection busy."""

_BYTES = BLOCK * CLUSTER
_SPENT = 2  # blocks kept while any of them has been read to its end
_MOST = 32  # blocks kept at most: several readers at different places
_UNDER_WAY = 8  # blocks asked for that nobody waits for yet: of readers that have gone elsewhere
_STREAMS = 8  # sequential readers that are told apart


class _Layout(Protocol):
    """What is needed of `qcow2.Layout`."""

    size: int
    data_offset: int
    clusters: int

    def tables(self, offset: int, length: int) -> bytes: ...
    def runs(self, first: int, count: int) -> Iterator[tuple[int, int]]: ...


class Disk(Protocol):
    """What is needed of `qcow2.DiskArtifact`."""

    name: str
    layout: Any

    def submit_clusters(self, first: int, count: int, buffer: memoryview) -> list[Any]: ...
    def close(self) -> None: ...


class _Block:
    """One block: asked for, then awaited by one thread (`taken`), then either `data` or `error`.

    `spent` once a reader has had its last byte; `users` are copying from it, so its memory cannot be used again; up to
    block `through` was asked for when a reader came to it.
    """

    __slots__ = ("data", "error", "memory", "number", "pending", "spent", "taken", "through", "users")

    def __init__(self, number: int, memory: memoryview, pending: list[Any]) -> None:
        self.number = number
        self.memory = memory
        self.pending = pending
        self.taken = False
        self.data: memoryview | None = None
        self.error: Exception | None = None
        self.spent = False
        self.through = -1
        self.users = 0


class Coming:
    """Bytes on their way into somebody's memory: first `receive`, then `arrived`, which another thread may do."""

    __slots__ = ("_arrived", "_length", "_pending")

    def __init__(self, pending: Sequence[Any], length: int, arrived: Callable[[], None] | None = None) -> None:
        self._pending = pending
        self._length = length
        self._arrived = arrived

    def receive(self) -> None:
        """Wait until they are there, or raise; then nothing is written to that memory any more."""
        error: Exception | None = None
        for part in self._pending:
            try:
                part.result()
            except Exception as raised:  # noqa: BLE001 - once all parts have come to their end
                error = error or raised
        if error is not None:
            raise error

    def arrived(self) -> int:
        """Do what is to be done with them before anybody sees them; how many they are."""
        if self._arrived is not None:
            self._arrived()
        return self._length


class ReadAhead(Artifact):
    """The same bytes as the disk artifact, in blocks of 1 MiB of which four are asked for ahead of a sequential reader.

    They wait in the server and in the socket: whoever needs a block receives it in his own thread, so a reader costs
    no change of thread. With `eager` a thread receives what has been asked for, for readers that do other work between
    their reads. A few blocks stay in memory, so that small and unaligned reads do not read the disk twice. A reader of
    four whole blocks or more at once gets them straight into his own memory. Safe from several threads, at different
    places at once.

    A read raises what the disk raises, and ContractViolation after `close`.
    """

    def __init__(self, disk: Disk, *, eager: bool = False) -> None:
        self._disk = disk
        self._layout: _Layout = disk.layout
        self.name = disk.name
        self.size = self._layout.size
        # Blocks begin at whole MiB of the file, where readers' own steps begin: else each step would need two of them.
        self._shift: int = self._layout.data_offset // CLUSTER % BLOCK
        self._blocks = -(-(self._layout.clusters + self._shift) // BLOCK)
        self._eager = eager
        self._changed = threading.Condition()  # guards all below
        self._cache: OrderedDict[int, _Block] = OrderedDict()
        self._under_way: deque[_Block] = deque()  # asked for, and not taken
        self._memory: list[memoryview] = []  # of blocks that were dropped: fresh memory costs a page fault per 4 KiB
        self._streams: deque[int] = deque(maxlen=_STREAMS)  # the next offset of each, the one last heard of at the end
        self._receiver: threading.Thread | None = None
        self._closed = False

    def open(self) -> BinaryIO:
        """The artifact from byte 0."""
        return stream(self)

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`, or what is left before `size`."""
        buffer = bytearray(max(0, min(length, self.size - offset)))
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview, *, ahead: bool = True) -> int:
        """`read_at` straight into `buffer`; without `ahead` nothing is read that was not asked for."""
        end = min(offset + len(buffer), self.size)
        if end <= offset:
            return 0
        start = self._layout.data_offset
        done = 0
        if offset < start:
            done = min(end, start) - offset
            buffer[:done] = self._layout.tables(offset, done)
        if end > start:
            at, buffer = max(offset - start, 0), buffer[done : end - offset]
            ahead = ahead and self._is_sequential(offset, end)
            numbers = self._whole(at, end - start)
            if len(numbers) >= AHEAD:
                self._receive_into(numbers, buffer)
            else:
                self._copy(at, end - start, buffer, ahead=ahead)
        return end - offset

    def submit(self, offset: int, buffer: memoryview) -> Coming | None:
        """Begin to receive whole blocks where the reader wants them; None if `read_into` has to be called instead."""
        at, end = offset - self._layout.data_offset, offset + len(buffer) - self._layout.data_offset
        numbers = self._whole(at, end) if 0 <= at < end <= self._layout.clusters * CLUSTER else range(0)
        if not numbers:
            return None
        first, end = self.clusters_of(numbers[0])[0], self.clusters_of(numbers[-1])[1]
        pending = self._disk.submit_clusters(first, end - first, buffer)
        return Coming(pending, len(buffer), lambda: self.arrived(first, buffer))

    def close(self) -> None:
        """Let go of the connection and the thread, for good; reads that are under way fail."""
        self._closed = True
        self._disk.close()  # before the lock: it ends the read that its owner may wait for
        with self._changed:
            self._changed.notify_all()
        if self._receiver is not None:
            self._receiver.join()
        with self._changed:
            self._cache.clear()
            self._under_way.clear()
            self._memory.clear()

    def arrived(self, first: int, data: memoryview) -> None:
        """Called once for all that was read, whole blocks from data cluster `first` on, before anybody sees `data`."""

    def block_of(self, cluster: int) -> int:
        """The number of the block in which this data cluster lies."""
        return (cluster + self._shift) // BLOCK

    def clusters_of(self, number: int) -> tuple[int, int]:
        """(first, end) of the data clusters of a block; the first block and the last may be short."""
        first = number * BLOCK - self._shift
        return max(first, 0), min(first + BLOCK, self._layout.clusters)

    def fetch(self, numbers: list[int]) -> None:
        """Have these blocks read, if they are not there."""
        with self._changed:
            blocks = [self._want(number) for number in numbers]
        for block in blocks:
            self._wait(block)
            block.spent = True

    def _whole(self, at: int, end: int) -> range:
        """The numbers of the blocks that make up the bytes [at, end) of the data; empty if some are here already, or if
        the bytes begin or end within a block.
        """
        first, last = self.block_of(at // CLUSTER), self.block_of((end - 1) // CLUSTER)
        if at != self.clusters_of(first)[0] * CLUSTER or end != self.clusters_of(last)[1] * CLUSTER:
            return range(0)
        with self._changed:
            here = any(number in self._cache for number in range(first, last + 1))
        return range(0) if here else range(first, last + 1)

    def _receive_into(self, numbers: range, buffer: memoryview) -> None:
        """Receive these blocks where the reader wants them: without a copy, and without a change of thread for each."""
        if self._closed:
            raise ContractViolation(f"{self.name} was read after it was closed")
        waiting: deque[tuple[int, memoryview, list[Any]]] = deque()
        done = 0
        try:
            for number in numbers:
                first, end = self.clusters_of(number)
                memory = buffer[done : done + (end - first) * CLUSTER]
                done += len(memory)
                waiting.append((number, memory, self._disk.submit_clusters(first, end - first, memory)))
                if len(waiting) > AHEAD:
                    self._receive_first(waiting)
            while waiting:
                self._receive_first(waiting)
        except Exception:
            # The reader has his buffer back when he learns of it: nothing may be written there any more.
            for part in [part for _, _, pending in waiting for part in pending]:
                with suppress(Exception):
                    part.result()
            raise

    def _receive_first(self, waiting: deque[tuple[int, memoryview, list[Any]]]) -> None:
        number, memory, pending = waiting[0]
        for part in pending:
            part.result()
        waiting.popleft()
        self.arrived(self.clusters_of(number)[0], memory)

    def _copy(self, at: int, end: int, buffer: memoryview, *, ahead: bool) -> None:
        """Copy the bytes [at, end) of the data; blocks of this read are asked for while the first is awaited."""
        first, last = self.block_of(at // CLUSTER), self.block_of((end - 1) // CLUSTER)
        for number in range(first, last + 1):
            through = number + AHEAD if ahead else min(number + AHEAD, last)
            with self._changed:
                block = self._want(number)
                block.users += 1
                if through > block.through:  # a reader of small pieces comes to a block several times
                    block.through = through
                    for following in range(number + 1, min(through + 1, self._blocks)):
                        self._want(following)
                    self._shrink()
            try:
                data = self._wait(block)
                start = self.clusters_of(number)[0] * CLUSTER
                from_, to = max(at - start, 0), min(end - start, len(data))
                buffer[: to - from_] = data[from_:to]
                buffer = buffer[to - from_ :]
                block.spent = block.spent or to == len(data)
            finally:
                with self._changed:
                    block.users -= 1

    def _want(self, number: int) -> _Block:
        """The block of that number, asked for if it is not here. Called with the lock."""
        if self._closed:
            raise ContractViolation(f"{self.name} was read after it was closed")
        block = self._cache.get(number)
        if block is not None:
            self._cache.move_to_end(number)
            return block
        first, end = self.clusters_of(number)
        count = end - first
        whole = count == BLOCK and self._memory
        memory = self._memory.pop() if whole else memoryview(bytearray(count * CLUSTER))
        block = _Block(number, memory, self._disk.submit_clusters(first, count, memory))
        self._cache[number] = block
        self._under_way.append(block)
        if self._eager:
            if self._receiver is None:
                self._receiver = threading.Thread(target=self._receive, name=f"read-{self.name}", daemon=True)
                self._receiver.start()
            self._changed.notify_all()
        return block

    def _wait(self, block: _Block) -> memoryview:
        """The data of a block: received here, unless another thread does that already."""
        while (data := block.data) is None:
            with self._changed:
                while block.taken and block.data is None and block.error is None and not self._closed:
                    self._changed.wait()
                if block.error is not None:
                    raise block.error
                if self._closed:
                    raise ContractViolation(f"{self.name} was read while it was closed")
                if block.taken:
                    continue
                # Those of readers that have gone elsewhere first, or they would pile up.
                taken = self._under_way[0] if len(self._under_way) > _UNDER_WAY else block
                self._take(taken)
            self._finish(taken)
        return data

    def _take(self, block: _Block) -> None:
        block.taken = True
        self._under_way.remove(block)

    def _finish(self, block: _Block) -> None:
        """Receive a block that this thread has taken."""
        try:
            for part in block.pending:
                part.result()
            self.arrived(self.clusters_of(block.number)[0], block.memory)
        except Exception as error:  # noqa: BLE001 - whoever waits for the block raises it
            with self._changed:
                block.error = error
                if self._cache.get(block.number) is block:
                    del self._cache[block.number]  # the next reader asks the disk again
                self._changed.notify_all()
        except BaseException:  # a signal's, which is this thread's alone: the next one who waits takes the block
            with self._changed:
                block.taken = False
                self._under_way.appendleft(block)
                self._changed.notify_all()
            raise
        else:
            with self._changed:
                block.data = block.memory
                self._changed.notify_all()

    def _receive(self) -> None:
        """Receive what was asked for, in that order; the thread's whole life."""
        while True:
            with self._changed:
                while not (self._under_way or self._closed):
                    self._changed.wait()
                if self._closed:
                    return
                block = self._under_way[0]
                self._take(block)
            self._finish(block)

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

    def _is_sequential(self, offset: int, end: int) -> bool:
        """Whether this read goes on where an earlier one ended, give or take one block (several may be in flight)."""
        with self._changed:
            streams = self._streams
            if streams and 0 <= offset - streams[-1] <= _BYTES:  # as a rule
                streams[-1] = end
                return True
            for following in streams:
                if abs(offset - following) <= _BYTES:
                    self._streams.remove(following)
                    self._streams.append(max(end, following))
                    return True
            self._streams.append(end)
            return offset == 0
