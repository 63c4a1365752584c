"""Writing a large file so that the sync at its end finds little left to do."""

from __future__ import annotations

import os
from collections.abc import Callable

__all__ = ["RANGE", "Writeback"]

RANGE = 16 << 20
"""Bytes that are sent to the disk at once."""


def _send(fd: int, offset: int, length: int) -> None:
    # What is dirty begins its way to the disk, and stays in the page cache meanwhile (mm/fadvise.c). sync_file_range
    # would say the same, but Python does not have it.
    os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


class Writeback:
    """Sends to the disk what was written to `fd`, range by range, without waiting for it.

    By itself the kernel begins when a tenth of the memory is dirty, or after half a minute: a backup or a restore of a
    few GiB would lie in memory whole, and wait for all of it at its end. Only what is written forwards is sent, gaps
    included; after a jump the ranges begin anew, and the rest is left to the kernel.
    """

    def __init__(self, fd: int, send: Callable[[int, int, int], None] = _send) -> None:
        """`send` gets the descriptor, and offset and length in bytes."""
        self._fd = fd
        self._send = send
        self._start = self._end = 0

    def wrote(self, offset: int, length: int) -> None:
        """So many bytes were written there. Raises the OSError of the system call."""
        if not self._end <= offset < self._end + RANGE:
            self._start = offset
        self._end = offset + length
        if self._end - self._start >= RANGE:
            self._send(self._fd, self._start, self._end - self._start)
            self._start = self._end
