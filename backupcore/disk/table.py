"""The digests of a disk's clusters while a backup goes on, shared by the processes that read the disk."""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING

from blake3 import blake3

from backupcore.disk.extents import CLUSTER
from backupcore.errors import ContractViolation, IntegrityError, from_os_error

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["CLUSTER", "DIGEST", "Table", "digests"]

DIGEST = 32
"""Bytes of one digest (BLAKE3-256)."""

_MAGIC = b"sums-1\0\0"
_HEADER = 4096
_NONE = bytes(DIGEST)
_RECORDED, _READS, _BYTES = 2, 3, 4  # words of the header: counters, after the magic number and that of clusters
_PIECE = 32768  # clusters that one step looks at: 1 MiB of the table


def digests(buffer: memoryview) -> bytes:
    """The digests of the clusters in `buffer` (whole clusters of 64 KiB), joined in order."""
    if len(buffer) % CLUSTER:
        raise ValueError(f"{len(buffer)} bytes are no whole clusters of {CLUSTER}")
    return b"".join(blake3(buffer[at : at + CLUSTER]).digest() for at in range(0, len(buffer), CLUSTER))


class Table:
    """A file with the digest of each data cluster of one disk, in file order; zeros where there is none yet.

    The process of a file view and its parent use the same file, so they see the same digests and counters, also when
    one of them was killed. It takes 0.05 % of the data and is never held in memory: mapped, the 512 MiB of a disk of
    1 TiB would count as ours. Safe from several threads and processes. The format is private to one run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thread = threading.Condition()
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._release = weakref.finalize(self, os.close, self._file)
        magic = os.pread(self._file, _HEADER, 0).ljust(_HEADER)[: len(_MAGIC)]
        self.clusters = int.from_bytes(os.pread(self._file, 8, len(_MAGIC)), "little") if magic == _MAGIC else -1
        if os.fstat(self._file).st_size != _HEADER + self.clusters * DIGEST:
            self.close()
            raise ContractViolation(f"{path} is no table of sums")
        # The counters alone are mapped: they are looked at often, and moved with every block.
        self._counters = memoryview(mmap.mmap(self._file, _HEADER)).cast("Q")

    @classmethod
    def create(cls, path: Path, clusters: int) -> Table:
        """A new table of so many clusters at `path`, which must not exist. TargetFull where there is no room for it."""
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                # Reserved, not sparse: no backup should fail near its end for want of so little room.
                os.posix_fallocate(file, 0, _HEADER + clusters * DIGEST)
                os.pwrite(file, _MAGIC + clusters.to_bytes(8, "little"), 0)
            except BaseException:
                path.unlink()
                raise
            finally:
                os.close(file)
        except OSError as error:
            raise from_os_error(error, f"the table of sums, {clusters * DIGEST} bytes at {path}") from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> Table:
        """The table that `create` made, in this process or another."""
        return cls(path)

    @property
    def recorded(self) -> int:
        """How many clusters have a digest."""
        return self._counters[_RECORDED]

    @property
    def bytes_read(self) -> int:
        """Bytes that all processes have read from the disk's data clusters."""
        return self._counters[_BYTES]

    @property
    def reads(self) -> int:
        """A counter that moves with every read of the disk artifact; a stalled one shows that nobody reads it."""
        return self._counters[_READS]

    def complete(self) -> bool:
        """True once every cluster has its digest."""
        # A process that was killed between the two has written digests, but not counted them.
        return self.recorded == self.clusters or self.first_missing(0, self.clusters) is None

    def touch(self) -> None:
        """Move `reads`."""
        with self._locked():
            self._counters[_READS] += 1

    def record(self, first: int, new: bytes, count: int = 0) -> None:
        """Set the digests `new` of the clusters from `first` on, and add `count` to the bytes read.

        Raises IntegrityError where a cluster has another digest already: an export is a fixed point in time, so a
        cluster that changed between two reads means that what was stored belongs to no instant.
        """
        start = _HEADER + first * DIGEST
        if first < 0 or len(new) % DIGEST or first + len(new) // DIGEST > self.clusters:
            raise ValueError(f"{len(new)} bytes of digests at cluster {first} of {self.clusters}")
        with self._locked():
            self._counters[_BYTES] += count
            old = os.pread(self._file, len(new), start)
            if old == new:
                return
            fresh = len(new) // DIGEST if old.count(0) == len(old) else 0
            for at in range(0, 0 if fresh else len(new), DIGEST):
                if old[at : at + DIGEST] == _NONE:
                    fresh += 1
                elif old[at : at + DIGEST] != new[at : at + DIGEST]:
                    raise IntegrityError(f"data cluster {first + at // DIGEST} changed between two reads of the disk")
            os.pwrite(self._file, new, start)
            self._counters[_RECORDED] += fresh

    def first_missing(self, first: int, end: int) -> int | None:
        """The first cluster in [first, end) without a digest; None if all have one."""
        while first < end:
            step = min(_PIECE, end - first)
            piece = self._slice(first, step)
            at = piece.find(_NONE)
            while at >= 0:
                # A digest may end in zeros, and the next begin with some: only a whole one of zeros is missing.
                number = -(-at // DIGEST)
                if piece[number * DIGEST : (number + 1) * DIGEST] == _NONE:
                    return first + number
                at = piece.find(_NONE, at + 1)
            first += step
        return None

    def missing(self, first: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """The runs (first, count) of clusters in [first, end) without a digest, in order, neighbours joined."""
        end = self.clusters if end is None else min(end, self.clusters)
        while (start := self.first_missing(first, end)) is not None:
            first = start + 1
            while first < end:
                piece = self._slice(first, min(_PIECE, end - first))
                run = next((at for at in range(0, len(piece), DIGEST) if piece[at : at + DIGEST] != _NONE), len(piece))
                first += run // DIGEST
                if run < len(piece):
                    break
            yield start, first - start

    def read(self, first: int, count: int) -> bytes:
        """The digests of `count` clusters from `first` on; zeros where there is none yet."""
        return self._slice(first, count)

    def digest(self) -> bytes:
        """BLAKE3 over all digests: that of the sums artifact. ContractViolation if a cluster has none yet."""
        if (first := self.first_missing(0, self.clusters)) is not None:
            raise ContractViolation(f"the sums are not complete: data cluster {first} was not read")
        over = blake3()
        for first in range(0, self.clusters, _PIECE):
            over.update(self._slice(first, min(_PIECE, self.clusters - first)))
        return over.digest()

    def wait(self, seconds: float) -> None:
        """Wait until this process records something; another process shows itself only in the counters."""
        with self._thread:
            self._thread.wait(seconds)

    def close(self) -> None:
        """Close the file; it stays on disk. A second call does nothing."""
        with self._thread:
            if self._file >= 0:
                self._release()
                self._file = -1

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among threads and processes; a killed process lets go of its part (flock)."""
        with self._thread:
            if self._file < 0:
                raise ContractViolation("the sums of a disk were used after they were closed")
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)
                self._thread.notify_all()

    def _slice(self, first: int, count: int) -> bytes:
        start = _HEADER + first * DIGEST
        with self._locked():  # a digest that another process is just writing would be read in half
            return os.pread(self._file, count * DIGEST, start)
