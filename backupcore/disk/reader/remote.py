"""What an owner reads through its reader: a disk artifact, or the blocks of a disk."""

from __future__ import annotations

import io
import threading
from collections import deque
from typing import TYPE_CHECKING, BinaryIO, cast

from backupcore.disk.hashed import HashedDisk
from backupcore.disk.reader.channel import PIECE, SLOT, Channel
from backupcore.disk.reader.service import add, complete, connect, load
from backupcore.errors import BackupError, ContractViolation
from backupcore.model import Artifact

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    from backupcore.disk.ahead import Disk
    from backupcore.disk.qcow2 import BlockReader, Blocks, Pending
    from backupcore.disk.reader.reader import Reader

__all__ = ["RemoteBlocks", "RemoteDisk"]


class _Shown:
    """Something that the reader reads for us under a number, from its first use to `close`."""

    def __init__(self, reader: Reader, what: str) -> None:
        self.reader = reader
        self._what = what
        self._lock = threading.RLock()  # re-entrant: a signal handler may close it
        self._adding = threading.Lock()
        self._number = 0
        self._closed = False

    def number(self, make: Callable[..., Any], *arguments: Any) -> int:
        """Its number, `make` being called over there if it has none yet."""
        if not self._number:
            with self._adding:
                if self._closed:
                    raise self.refused("after")
                if not self._number:
                    number = self.reader.call(make, *arguments)
                    with self._lock:
                        self._number, closed = number, self._closed
                    if closed:
                        self.reader.release(number)
        if self._closed:
            raise self.refused("after")
        return self._number

    @property
    def closed(self) -> bool:
        return self._closed

    def refused(self, when: str) -> ContractViolation:
        return ContractViolation(f"{self._what} was read {when} it was closed")

    def close(self) -> None:
        with self._lock:
            first, self._closed = not self._closed, True
            number = self._number
        if first and number:
            self.reader.release(number)


class RemoteDisk(Artifact):
    """A `HashedDisk` that is read and hashed in the reader's process; its table is shared with that.

    Pickled it is the disk itself. A read raises what the disk raises, HypervisorError where the reader has ended, and
    ContractViolation after `close`.
    """

    def __init__(self, reader: Reader, hashed: HashedDisk) -> None:
        self.name = hashed.name
        self.size = hashed.size
        self.table = hashed.table
        self._hashed = hashed
        self._shown = _Shown(reader, hashed.name)

    def __reduce__(self) -> tuple[type[HashedDisk], tuple[Disk, Path]]:
        return self._hashed.__reduce__()

    @property
    def bytes_read(self) -> int:
        """Bytes that were asked from the disk's data, by all processes: more than the data if some were read twice."""
        return self._hashed.bytes_read

    def open(self) -> BinaryIO:
        """The artifact from byte 0: what comes next is asked for ahead."""
        return cast("BinaryIO", _Stream(self))

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`, or what is left before `size`."""
        buffer = bytearray(max(0, min(length, self.size - offset)))
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """`read_at` straight into `buffer`."""
        return self.read(offset, buffer, forwards=False)

    def read(self, offset: int, buffer: memoryview, *, forwards: bool) -> int:
        """`read_into`; with `forwards` more is asked for ahead."""
        buffer = buffer[: max(0, self.size - offset)]
        if buffer:
            number = self._number()
            reader = self._shown.reader
            try:
                target = reader.target(buffer)
                with reader.window(number, offset) as window:
                    window.read_into(buffer, self.size, target, forwards=forwards)
            except BackupError as error:
                if self._shown.closed:
                    raise self._shown.refused("while") from error
                raise
        return len(buffer)

    def load(self, first: int, end: int) -> None:
        """Read up to four blocks of the clusters [first, end) that have no digest, so that they have one."""
        self._shown.reader.call(load, self._number(), first, end)

    def complete(self) -> None:
        """Read whatever has not been read yet, so that every cluster has its digest."""
        self._shown.reader.call(complete, self._number())

    def close(self) -> None:
        """Close its connections, for good: when this returns the reader has none to this disk.

        Reads that are under way fail. It waits for nothing that could hang: a reader that does not answer is ended.
        """
        self._shown.close()

    def _number(self) -> int:
        return self._shown.number(add, self._hashed)


class _Stream(io.RawIOBase):
    """The sequential stream of a `RemoteDisk`. A read of it gives all that was asked for, but at the end."""

    def __init__(self, disk: RemoteDisk) -> None:
        super().__init__()
        self._disk = disk
        self._offset = 0

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # Buffer has no length
        """Fill `buffer` with the next bytes and return how many; 0 at the end."""
        count = self._disk.read(self._offset, memoryview(buffer), forwards=True)
        self._offset += count
        return count

    def tell(self) -> int:
        """The offset of the next byte."""
        return self._offset


class RemoteBlocks:
    """The blocks of a disk, read in the reader's process: each connection is made there."""

    def __init__(self, reader: Reader, blocks: Blocks) -> None:
        self._reader = reader
        self._blocks = blocks

    def __reduce__(self) -> tuple[Callable[[Blocks], Blocks], tuple[Blocks]]:
        return _itself, (self._blocks,)

    def connect(self) -> BlockReader:
        """A new connection over there."""
        shown = _Shown(self._reader, "a disk")
        shown.number(connect, self._blocks)
        return _Connection(shown, self._reader.channel())


class _Connection:
    """A connection of the reader's, with a channel of its own: several reads may be under way."""

    def __init__(self, shown: _Shown, channel: Channel) -> None:
        self._shown = shown
        self._channel = channel
        self._lock = threading.RLock()
        self._waiting: deque[tuple[_Later, memoryview, int]] = deque()  # and the place in the slot
        self._count = 0

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on, or raise."""
        self.submit(offset, buffer).result()

    def submit(self, offset: int, buffer: memoryview) -> Pending:
        """Begin to fill `buffer` with the bytes from `offset` on."""
        later = _Later(self)
        number = self._shown.number(connect)
        with self._lock:
            for at in range(0, len(buffer), PIECE):
                part = buffer[at : at + PIECE]
                if len(self._waiting) == SLOT // PIECE:
                    self._finish_first()
                place = self._count % (SLOT // PIECE) * PIECE
                self._channel.read((0, number, offset + at, place, len(part)))
                self._waiting.append((later, part, place))
                later.left += 1
                self._count += 1
        return later

    def finish(self, later: _Later) -> None:
        """Take answers until all of these are here."""
        with self._lock:
            while later.left:
                self._finish_first()

    def _finish_first(self) -> None:
        later, part, place = self._waiting.popleft()
        try:
            self._channel.answer()
            part[:] = self._channel.slot[place : place + len(part)]
        except Exception as error:  # noqa: BLE001 - whoever waits for it raises it
            later.error = later.error or error
        finally:
            later.left -= 1

    def close(self) -> None:
        """End the connection; reads that wait end with an error."""
        self._shown.close()
        self._channel.close()


class _Later:
    """A read of a `_Connection` under way."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self.left = 0  # pieces that have no answer yet
        self.error: Exception | None = None

    def result(self) -> None:
        """Return once the buffer is filled, or raise what ended the read."""
        self._connection.finish(self)
        if self.error is not None:
            raise self.error


def _itself(blocks: Blocks) -> Blocks:
    return blocks
