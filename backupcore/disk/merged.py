"""The data of a flattened disk, read from its layers and held against the digests that were taken from the guest.

Everything here can be pickled: it is addresses and tables, and whoever reads, in whichever process, opens the layers
for itself.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from backupcore.disk.extents import CLUSTER
from backupcore.disk.geometry import clusters_of
from backupcore.disk.parallel import REQUESTS, in_parallel
from backupcore.disk.qcow2 import BlockReader, Pending
from backupcore.disk.spans import MOST, Span, spans
from backupcore.disk.stored import read_exactly
from backupcore.disk.table import DIGEST, digests
from backupcore.disk.winners import Run, Winners
from backupcore.errors import ContractViolation, IntegrityError
from backupcore.model import Artifact, stream

__all__ = ["MergedArtifact", "MergedBlocks", "MergedData", "MergedLayer"]

_STEP = 16  # clusters that a layer which is read forward is asked for at once


@dataclass(frozen=True, slots=True)
class MergedLayer:
    """One layer: its name for messages, its artifact, and where its data clusters begin."""

    name: str
    artifact: Artifact
    data_offset: int


class _Streamed:
    """A layer that can only be read forward. A read of what has passed opens it again, from byte 0."""

    def __init__(self, layer: MergedLayer) -> None:
        self._layer = layer
        self._lock = threading.Lock()
        self._stream: BinaryIO | None = None
        self._position = 0
        self._ended = False

    def read_into(self, index: int, buffer: memoryview) -> None:
        offset = self._layer.data_offset + index * CLUSTER
        with self._lock:
            if self._ended:
                raise ContractViolation(f"{self._layer.name} was read after it was closed")
            if self._stream is None or offset < self._position:
                self._close()
                self._stream = self._layer.artifact.open()
                self._position = 0
            while self._position < offset:
                self._next(min(offset - self._position, _STEP * CLUSTER))
            for at in range(0, len(buffer), _STEP * CLUSTER):
                part = buffer[at : at + _STEP * CLUSTER]
                part[:] = self._next(len(part))
            if self._ended or self._position == self._layer.artifact.size:
                self._close()

    def _next(self, length: int) -> bytes:
        assert self._stream is not None
        try:
            data = read_exactly(self._stream, length, self._layer.name)
        except BaseException:
            self._close()
            raise
        self._position += length
        return data

    def _close(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            stream.close()

    def close(self) -> None:
        # A stream that somebody reads is closed by that read: if it hangs, it must not hold up whoever ends it.
        self._ended = True
        if self._lock.acquire(blocking=False):
            try:
                self._close()
            finally:
                self._lock.release()


class _Seekable:
    """A layer of which any part can be fetched."""

    def __init__(self, layer: MergedLayer) -> None:
        self._layer = layer

    def read_into(self, index: int, buffer: memoryview) -> None:
        count = self._layer.artifact.read_into(self._layer.data_offset + index * CLUSTER, buffer)
        if count != len(buffer):
            raise IntegrityError(f"{self._layer.name} ends within data cluster {index + count // CLUSTER}")

    def close(self) -> None:
        pass


class MergedData:
    """The data clusters of a flattened disk, by their number in its file; from several threads.

    `sums` is a file with the digest of each of them (32 bytes, in file order), as its layer had it.
    """

    def __init__(self, merged: Winners, layers: Sequence[MergedLayer], sums: Path) -> None:
        """Nothing is opened yet but `sums`."""
        self._merged = merged
        self._layers = layers
        self._sums = os.open(sums, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._sums)  # not in `close`: a read under way may be about to use it
        self._readers = [_Seekable(layer) if layer.artifact.seekable else _Streamed(layer) for layer in layers]

    def read_into(self, first: int, buffer: memoryview) -> None:
        """The clusters from `first` on; the last one may be cut. IntegrityError for one that was changed."""
        done = 0
        for run in self._merged.runs.within(first, clusters_of(len(buffer))):
            part = buffer[done : done + run.clusters * CLUSTER]
            # A digest is that of a whole cluster.
            whole = part if len(part) == run.clusters * CLUSTER else memoryview(bytearray(run.clusters * CLUSTER))
            self._readers[run.layer].read_into(run.at, whole)
            self._check(run, whole)
            if whole is not part:
                part[:] = whole[: len(part)]
            done += len(part)

    def fetched(self, check: Callable[[], None]) -> Iterator[list[tuple[Run, memoryview, bytes]]]:
        """All of the data by runs, each with its bytes and digests, in any order; several spans are fetched at once.

        The bytes are there until the next list is asked for. `check` is called at least ten times a second and may
        raise. Layers that can only be read forward are not for this.
        """
        jobs = spans(self._merged.runs, [layer.data_offset // CLUSTER for layer in self._layers])
        return in_parallel(jobs, self._fetch, check, size=MOST * CLUSTER)

    def _fetch(self, span: Span, buffer: memoryview) -> list[tuple[Run, memoryview, bytes]]:
        self._readers[span.layer].read_into(span.at, buffer[: span.clusters * CLUSTER])
        found = []
        for run in span.runs:
            start = (run.at - span.at) * CLUSTER
            data = buffer[start : start + run.clusters * CLUSTER]
            found.append((run, data, self._check(run, data)))
        return found

    def _check(self, run: Run, data: memoryview) -> bytes:
        """The digests that the clusters of a run must have. IntegrityError if they have not."""
        found = digests(data)
        due = os.pread(self._sums, run.clusters * DIGEST, run.first * DIGEST)
        if found != due:
            wrong = next(
                at for at in range(run.clusters) if found[at * DIGEST :][:DIGEST] != due[at * DIGEST :][:DIGEST]
            )
            raise IntegrityError(
                f"{self._layers[run.layer].name}: data cluster {run.at + wrong} is not what was backed up",
                "Nothing was changed. Restore an older increment, and start a new image with: vmkeep backup --reset",
            )
        if self._merged.cut:
            for number in range(run.clusters):
                left = self._merged.cut.get(run.first + number)
                if left is not None:
                    data[number * CLUSTER + left : (number + 1) * CLUSTER] = bytes(CLUSTER - left)
        return due

    @property
    def requests(self) -> int:
        """How many reads can be under way at once: one where a layer can only be read forward."""
        return REQUESTS if all(layer.artifact.seekable for layer in self._layers) else 1

    def close(self) -> None:
        """Let go of the layers."""
        for reader in self._readers:
            reader.close()


@dataclass(frozen=True)
class MergedBlocks:
    """The guest's bytes of a flattened disk in guest order, for `backupcore.disk.qcow2.DiskArtifact`."""

    merged: Winners
    layers: Sequence[MergedLayer]
    sums: Path

    def connect(self) -> BlockReader:
        """Layers of this process's own."""
        return _Reader(self)

    def data(self) -> MergedData:
        """The same by clusters, with layers of this process's own."""
        return MergedData(self.merged, self.layers, self.sums)


class _Reader:
    def __init__(self, blocks: MergedBlocks) -> None:
        layout = blocks.merged.layout
        self._place = layout.places
        self._data = blocks.data()
        self._pool = ThreadPoolExecutor(self._data.requests, "merge")
        self._lock = threading.Lock()
        self._under_way: set[Future[None]] = set()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        _, first, count = next(self._place(offset, clusters_of(len(buffer)) * CLUSTER))
        if count * CLUSTER < len(buffer):
            raise ValueError(f"{len(buffer)} bytes at {offset} are not all data")
        self._data.read_into(first, buffer)

    def submit(self, offset: int, buffer: memoryview) -> Pending:
        future: Future[None] = Future()
        with self._lock:
            self._under_way.add(future)
        self._pool.submit(self._run, future, offset, buffer)
        return future

    def _run(self, future: Future[None], offset: int, buffer: memoryview) -> None:
        error: BaseException | None = None
        try:
            self.read_into(offset, buffer)
        except BaseException as caught:  # noqa: BLE001 - whoever waits for the read raises it
            error = caught
        self._settle(future, error)

    def _settle(self, future: Future[None], error: BaseException | None) -> None:
        with self._lock:
            if future not in self._under_way:
                return
            self._under_way.remove(future)
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def close(self) -> None:
        # A read that hangs is ended by what its layer hangs on, once we let that happen: nobody waits for it any more.
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            left = list(self._under_way)
        for future in left:
            self._settle(future, ContractViolation("a flattened disk was read while it was closed"))
        self._data.close()


class MergedArtifact(Artifact):
    """The file of a flattened disk as it lies after a store has copied its layers, for what the store must be sent."""

    def __init__(self, name: str, blocks: MergedBlocks) -> None:
        self.name = name
        self.size = blocks.merged.layout.size
        self.blocks = blocks
        self._lock = threading.Lock()
        self._data: MergedData | None = None

    def __reduce__(self) -> tuple[type[MergedArtifact], tuple[str, MergedBlocks]]:
        return MergedArtifact, (self.name, self.blocks)

    def open(self) -> BinaryIO:
        """The file from byte 0."""
        return stream(self)

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`, or what is left; data are held against their digests."""
        layout = self.blocks.merged.layout
        end = min(offset + length, self.size)
        start = layout.data_offset
        tables = layout.tables(offset, max(0, min(end, start) - offset)) if offset < start else b""
        offset += len(tables)
        if offset >= end:
            return tables
        first = (offset - start) // CLUSTER
        buffer = bytearray((clusters_of(end - start) - first) * CLUSTER)
        self._opened().read_into(first, memoryview(buffer))
        skip = offset - start - first * CLUSTER
        return tables + memoryview(buffer)[skip : skip + end - offset]

    def _opened(self) -> MergedData:
        with self._lock:
            if self._data is None:
                self._data = self.blocks.data()
            return self._data

    def close(self) -> None:
        """Let go of the layers."""
        with self._lock:
            if self._data is not None:
                self._data.close()
