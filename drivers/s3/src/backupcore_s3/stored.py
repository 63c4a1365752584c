"""What `restore` returns: artifacts that are fetched range by range when they are read."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO

from backupcore.model import Artifact
from backupcore_s3.bucket import Bucket

if TYPE_CHECKING:
    from backupcore import Context

__all__ = ["StoredArtifact"]

RANGE = 8 << 20
"""Bytes of one request of a sequential reader that has come far."""

_FIRST = 1 << 20
"""Bytes of its first request. Each later one is for as many as came before it, up to `RANGE`: none goes over the end of
a part, which a store would read both of."""

_MEMORY = 64 << 20  # bytes that are fetched ahead of it

_LOOK = 0.1  # seconds between two looks at whether the run is cancelled


class StoredArtifact(Artifact):
    """One object. Pickles without its context and client: another process makes a client of its own."""

    seekable = True

    def __init__(self, bucket: Bucket, key: str, name: str, size: int, ctx: Context | None) -> None:
        self.name = name
        self.size = size
        self._bucket = bucket
        self._key = key
        self._ctx = ctx

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ctx": None}

    def open(self) -> BinaryIO:
        """The object from byte 0; several ranges ahead are fetched once it is read."""
        ahead = _Ahead(self, self._bucket.options.concurrency)
        if self._ctx is not None:
            self._ctx.stack.callback(ahead.close)
        return io.BufferedReader(ahead, 1 << 20)

    def read_at(self, offset: int, length: int) -> bytes:
        """One request for this range."""
        return bytes(self.fetch(offset, max(0, min(length, self.size - offset)), self.check))

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """The same straight into `buffer`."""
        count = max(0, min(len(buffer), self.size - offset))
        self._bucket.read_into(self._key, offset, buffer[:count], self.check)
        return count

    def fetch(self, offset: int, length: int, check: Callable[[], None]) -> bytearray:
        """The same in memory of its own; the range must lie within the object. What `check` raises ends the request."""
        return self._bucket.read(self._key, offset, length, check)

    def check(self) -> None:
        """Raise if the work is to stop."""
        if self._ctx is not None:
            self._ctx.check()


class _Ahead(io.RawIOBase):
    """A sequential stream for which threads fetch the next ranges: the further it is read, the larger and the more.

    Most streams are of small files, or of the tables of a disk, whose data are not wanted: a chain has many of those,
    and what was fetched beyond them cost more than all the tables. Threads end with the stream.
    """

    def __init__(self, artifact: StoredArtifact, workers: int) -> None:
        super().__init__()
        self._artifact = artifact
        self._range = min(RANGE, _MEMORY // workers)
        self._workers = workers
        self._offset = 0
        self._changed = threading.Condition()  # guards all below
        self._next = 0  # the next range that nobody fetches yet
        self._reading = 0  # the range that the reader is in
        self._fetched: dict[int, bytearray | BaseException] = {}
        self._started = 0  # threads
        self._ended = False

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with the next bytes and return how many; 0 at the end."""
        self._artifact.check()
        if self._offset >= self._artifact.size:
            return 0
        data = memoryview(self._get())
        at = self._offset - self._start(self._reading)
        count = min(len(buffer), len(data) - at)
        buffer[:count] = data[at : at + count]
        self._offset += count
        return count

    def _start(self, number: int) -> int:
        """Where a range begins, and the one before it ends."""
        if not number:
            return 0
        doubled = min(number - 1, (self._range // _FIRST).bit_length() - 1)
        return min((_FIRST << doubled) + (number - 1 - doubled) * self._range, self._artifact.size)

    @property
    def _at_once(self) -> int:
        """Ranges that are under way at once where the reader is."""
        return min(self._workers, 1 + self._reading // 2)

    def _get(self) -> bytearray:
        """The range in which the reader is."""
        with self._changed:
            if self._offset == self._start(self._reading + 1):
                self._fetched.pop(self._reading, None)
                self._reading += 1
                self._changed.notify_all()
            while self._started < self._at_once and self._start(self._next) < self._artifact.size:
                threading.Thread(target=self._fetch, name=f"s3-ahead-{self._started}", daemon=True).start()
                self._started += 1
            while (found := self._fetched.get(self._reading)) is None:
                self._check()
                self._changed.wait(_LOOK)
        if isinstance(found, BaseException):
            raise found
        return found

    def _check(self) -> None:
        """Raise if nobody reads any more."""
        self._artifact.check()
        if self.closed:
            raise ValueError("the stream is closed")

    def _fetch(self) -> None:
        while True:
            with self._changed:
                while not self._ended and self._next >= self._reading + self._at_once:
                    self._changed.wait()
                number = self._next
                start, end = self._start(number), self._start(number + 1)
                if self._ended or start == end:
                    return
                self._next += 1
            found: bytearray | BaseException
            try:
                found = self._artifact.fetch(start, end - start, self._check)
            except BaseException as error:  # noqa: BLE001 - raised by the reader when it comes there
                found = error
            with self._changed:
                if self.closed:
                    return  # a run remembers its streams to its end: nothing may be left in them
                self._fetched[number] = found
                self._ended = self._ended or isinstance(found, BaseException)
                self._changed.notify_all()

    def close(self) -> None:
        """Let go of what was fetched; the threads end within the request that they have under way."""
        if not self.closed:
            super().close()
            with self._changed:
                self._ended = True
                self._fetched.clear()
                self._changed.notify_all()
