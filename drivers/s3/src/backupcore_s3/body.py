"""What is sent: bytes that can be read again, at a limited pace, and given up in the middle."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["Body", "Pace", "Stopped"]

PIECE = 128 << 10
"""Bytes between two looks at the pace and at whether to go on: what botocore's connection asks for at once."""


class Stopped(BaseException):
    """Carries an error of the source, or a cancel, out of a request.

    No Exception on purpose: botocore takes any that a body raises for a failure of the network, and sends again.
    """

    def __init__(self, reason: BaseException) -> None:
        super().__init__(reason)
        self.reason = reason


class Pace:
    """A limit of bytes per second for all threads of one datastore together; 0: none."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._thread = threading.local()

    def signing(self, **_: object) -> None:
        """This thread reads its body for a signature or a checksum now, which is no traffic. A handler of botocore."""
        self._thread.counts = False

    def sending(self, **_: object) -> None:
        """This thread sends its body now. A handler of botocore."""
        self._thread.counts = True

    def take(self, count: int, check: Callable[[], None], *, sent: bool = False) -> None:
        """Wait until `count` bytes may pass; `sent` where only bytes that are sent count."""
        if not self._limit or (sent and not getattr(self._thread, "counts", True)):
            return
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + count / self._limit
            until = self._free_at
        while (left := until - time.monotonic()) > 0:
            check()
            time.sleep(min(left, 0.1))


class Body:
    """`length` bytes that `source(offset, count)` gives, as the file that botocore wants."""

    def __init__(
        self, length: int, source: Callable[[int, int], bytes | memoryview], *, pace: Pace, check: Callable[[], None]
    ) -> None:
        self._length = length
        self._source = source
        self._pace = pace
        self._check = check
        self._offset = 0

    def __len__(self) -> int:
        return self._length

    def read(self, size: int | None = None) -> bytes | memoryview:
        """The next bytes. Anything that goes wrong here, also a cancel, leaves as `Stopped`."""
        left = self._length - self._offset
        count = left if size is None or size < 0 else min(size, left)
        try:
            self._check()
            self._pace.take(count, self._check, sent=True)
            data = self._source(self._offset, count) if count else b""
        except BaseException as error:
            raise Stopped(error) from error
        self._offset += count
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to an offset: botocore rewinds what it sends again."""
        self._offset = offset + (0, self._offset, self._length)[whence]
        return self._offset

    def tell(self) -> int:
        """The offset of the next byte."""
        return self._offset
