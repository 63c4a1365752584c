"""One disk put together from the layers of its chain, into whatever it is restored to.

Where the store can seek, all layers are laid over one another first and only the ranges that win are fetched, several
at once: into a file or a device in large spans, into a stream in guest order. Otherwise each layer is read once, as a
stream, newest first (`backupcore.disk.merge`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, BinaryIO

from backupcore.disk.extents import CLUSTER, Kind, complement
from backupcore.disk.geometry import clusters_of
from backupcore.disk.merge import Target, merge, put
from backupcore.disk.qcow2 import DiskArtifact, Layout
from backupcore.disk.table import DIGEST
from backupcore.disk.winners import Run, Winners, winners
from backupcore.merging import MOST_STREAMS, MergedDisk
from backupcore.opened import Opened, layers_of, parts_of

if TYPE_CHECKING:
    from backupcore.context import Context
    from backupcore.disk.qcow2 import Pending
    from backupcore.manifest import DiskPart
    from backupcore.model import SourceRef

__all__ = ["Assembly", "Nowhere"]

_STEP = 16 * CLUSTER  # bytes that are fetched at once
_AHEAD = 4  # ... and how many such fetches are under way


class Nowhere:
    """A target that keeps nothing: what is read is held against its digests all the same."""

    def write(self, offset: int, data: memoryview) -> None:
        """Forget it."""

    def zero(self, offset: int, length: int) -> None:
        """Forget it."""


class Assembly:
    """The disk `part` of the last of `backups`, oldest first. Nothing is fetched before it is needed."""

    def __init__(self, backups: Sequence[Opened], part: DiskPart, ctx: Context) -> None:
        self.part = part
        self._backups = backups
        self._ctx = ctx
        self._parts = parts_of(backups, part.id)
        self._artifacts = [backup.artifact(one.artifact, one.size) for backup, one in self._parts]
        self.ranged = all(artifact.seekable for artifact in self._artifacts)

    @property
    def layers(self) -> tuple[tuple[int, SourceRef], ...]:
        """What it is put together from, oldest first: increment and source."""
        return tuple((backup.increment.id, backup.increment.source) for backup, _ in reversed(self._parts))

    @property
    def in_guest_order(self) -> bool:
        """Whether it can be read from its first byte to its last without a copy on this host."""
        short = len(self._parts) <= MOST_STREAMS
        return self.ranged or (short and all(one.order == "guest" for _, one in self._parts))

    @property
    def most(self) -> int:
        """Bytes that the result has at most, told without reading anything."""
        return sum(artifact.size for artifact in self._artifacts)

    @property
    def to_read(self) -> int:
        """What progress counts up to."""
        return self._layout.clusters * CLUSTER if self.ranged else self.most

    @property
    def size(self) -> int:
        """Bytes that the result has, as a compact qcow2 file; the tables of all layers are read for it."""
        return self._layout.size

    @cached_property
    def _disk(self) -> MergedDisk:
        return MergedDisk(self._backups, self.part, self._ctx)

    @cached_property
    def _winners(self) -> Winners:
        return winners(self._disk.layouts)

    @property
    def _layout(self) -> Layout:
        layout = self._winners.layout
        assert isinstance(layout, Layout)
        return layout

    def into(self, target: Target, advance: Callable[[int], None]) -> None:
        """Give all of the disk to `target`, which the caller finishes; `advance` gets the bytes done of `to_read`."""
        if not self.ranged:
            layers = layers_of(self._backups, self.part.id, self._ctx.folder)
            merge(layers, target, progress=advance, check=self._ctx.check)
            return
        size = self.part.virtual_size
        data = [extent for extent in self._layout.extents() if extent.kind is Kind.DATA]
        for offset, length in complement(data, clusters_of(size) * CLUSTER):
            if offset < size:
                target.zero(offset, min(length, size - offset))
        blocks = self._disk.blocks(self._winners, self._ctx.folder, self._ctx).data()
        done = 0
        for runs in blocks.fetched(self._ctx.check):
            for run, chunk, sums in runs:
                self._put(target, run, chunk, sums)
                done += len(chunk)
            advance(done)

    def _put(self, target: Target, run: Run, data: memoryview, sums: bytes) -> None:
        at = 0
        for offset, length in self._layout.runs(run.first, run.clusters):
            first, end = at // CLUSTER, clusters_of(at + length)
            put(target, offset, data[at : at + length], sums[first * DIGEST : end * DIGEST])
            at += length

    def chunks(self) -> Iterator[tuple[int, memoryview]]:
        """(guest offset, bytes) of all data in guest order; several reads are under way where the store can seek."""
        size = self.part.virtual_size
        places = (
            (at, min(_STEP, extent.end - at, size - at))
            for extent in self._layout.extents()
            if extent.kind is Kind.DATA
            for at in range(extent.offset, extent.end, _STEP)
        )
        reader = self._disk.blocks(self._winners, self._ctx.folder, self._ctx).connect()
        waiting: deque[tuple[int, memoryview, Pending]] = deque()
        with self._ctx.on_cancel(reader.close):
            try:
                for offset, length in places:
                    buffer = memoryview(bytearray(length))
                    waiting.append((offset, buffer, reader.submit(offset, buffer)))
                    if len(waiting) >= _AHEAD:
                        yield self._settled(*waiting.popleft())
                while waiting:
                    yield self._settled(*waiting.popleft())
            finally:
                reader.close()

    def _settled(self, offset: int, buffer: memoryview, pending: Pending) -> tuple[int, memoryview]:
        try:
            pending.result()
        finally:
            self._ctx.check()  # a cancel closes the reader, which is not what the user is told
        return offset, buffer

    def stream_qcow2(self, out: BinaryIO, advance: Callable[[int], None]) -> None:
        """Write the disk as a compact qcow2 file to a stream, first byte to last."""
        layout = self._layout
        head = DiskArtifact(self.part.artifact, layout, self._disk.blocks(self._winners, self._ctx.folder, self._ctx))
        with self._ctx.on_cancel(head.close):
            try:
                with head.open() as file:
                    while block := file.read(_STEP):
                        self._ctx.check()
                        out.write(block)
                        advance(len(block))
            finally:
                head.close()

    def stream_raw(self, out: BinaryIO, advance: Callable[[int], None]) -> None:
        """Write the disk's bytes to a stream, first to last."""
        position = 0
        for offset, chunk in self.chunks():
            _pad(out, offset - position, self._ctx, advance)
            out.write(chunk)
            advance(len(chunk))
            position = offset + len(chunk)
        _pad(out, self.part.virtual_size - position, self._ctx, advance)


def _pad(out: BinaryIO, length: int, ctx: Context, advance: Callable[[int], None]) -> None:
    zeros = bytes(min(_STEP, max(0, length)))
    while length > 0:
        ctx.check()
        out.write(zeros[:length])
        advance(min(len(zeros), length))
        length -= len(zeros)
