"""Where the bytes of a backup or of a restore go: an open file or device of this host."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from backupcore.disk.direct import reopened, suits
from backupcore.disk.writeback import Writeback

__all__ = ["Output"]


class Output:
    """Writes to a descriptor: large pieces past the page cache where that is a gain, others through it.

    What goes through the cache is sent to the disk early. The descriptor stays the caller's, who syncs it: after that
    all of it is on stable storage. Not for several threads at once.
    """

    def __init__(self, fd: int, large: Callable[[int, memoryview], bool] = suits) -> None:
        """`large` tells of an offset and of what is to be written there whether it may go past the cache."""
        self._fd = fd
        self._large = large
        self._direct = reopened(fd)
        self._writeback = Writeback(fd)

    def write(self, offset: int, data: memoryview) -> None:
        """All of `data` at `offset`. OSError as the kernel gives it."""
        while data:
            done = self._put(offset, data)
            offset, data = offset + done, data[done:]

    def close(self) -> None:
        """Let go of what was opened here."""
        if self._direct is not None:
            direct, self._direct = self._direct, None
            os.close(direct)

    def _put(self, offset: int, data: memoryview) -> int:
        if self._direct is not None and self._large(offset, data):
            try:
                return os.pwrite(self._direct, data, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.close()  # a disk with larger sectors, of which open says nothing
        done = os.pwrite(self._fd, data, offset)
        self._writeback.wrote(offset, done)
        return done
