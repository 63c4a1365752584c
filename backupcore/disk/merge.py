"""Several layers of one disk -> one disk; the newest layer that holds a cluster wins.

Layers are read newest to oldest, one at a time, each as one sequential stream from which only the clusters that no
newer layer holds are used. Every cluster used is compared with the digest that was taken when it was read from the
guest, before it goes to the target.

Memory goes by how scattered the layers are (the ranges not covered yet, the layer's extents), plus a few MiB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import BinaryIO, Protocol

from backupcore.disk.extents import CLUSTER, Extent, ExtentTable, Kind, complement, intersect
from backupcore.disk.geometry import clusters_of
from backupcore.disk.qcow2 import Layout
from backupcore.disk.scattered import ScatteredLayout
from backupcore.disk.stored import Order, StoredDisk, read_exactly
from backupcore.disk.table import DIGEST, digests
from backupcore.errors import IntegrityError

__all__ = ["Layer", "Target", "merge", "put"]

_STEP = 16  # clusters read at once: 1 MiB, after which a cancel is looked for
_BATCH = 4 * _STEP  # clusters that are checked and written in one go, while the next are being read
_ZERO_CLUSTER = digests(memoryview(bytes(CLUSTER)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One disk artifact of one backup.

    `name` is for messages and says which disk of which increment. `open` gives the artifact from byte 0 and `sums` its
    digests (32 bytes of BLAKE3 for each data cluster, in file order; the caller has checked them as a whole): both
    sequential streams, opened only when the layer is needed, and closed here. `size`, `virtual_size`, `whole`,
    `tables_digest` and `order` come from the manifest.
    """

    name: str
    open: Callable[[], BinaryIO]
    sums: Callable[[], BinaryIO]
    size: int
    virtual_size: int
    whole: bool
    tables_digest: bytes | None
    order: Order = "guest"


class Target(Protocol):
    """Where the merged disk goes. Every byte of it is given once, as data or as zeros, in no particular order.

    Calls come from one thread at a time, though not always the same. `backupcore.disk.writer.DiskWriter` is one.
    """

    def write(self, offset: int, data: memoryview) -> None:
        """Keep `data` (whole clusters, or up to the end of the disk) at the guest offset."""

    def zero(self, offset: int, length: int) -> None:
        """Let the range read as zeros."""


def merge(
    layers: Sequence[Layer],
    target: Target,
    *,
    progress: Callable[[int], None] = lambda done: None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write the disk that `layers`, newest first, make up; `target` is left for the caller to finish.

    The newest layer decides the size. Layers older than the first that is `whole` are not looked at; what that one does
    not hold reads as zeros, and so does what lies past the end of a layer that is shorter than those around it.

    `check` is called at least once for each MiB read and may raise. `progress` gets the bytes done, out of the sum of
    the sizes of the layers up to the first whole one; what need not be read counts as done.

    Raises IntegrityError, naming layer and place, for a stream that is damaged, too short or too long, and for a chain
    without a whole layer; what a stream, the target or `check` raise passes through.
    """
    used = _needed(layers)
    size = limit = used[0].virtual_size
    gaps = ExtentTable([Extent(0, clusters_of(size) * CLUSTER, Kind.DATA)])
    done = 0
    with ThreadPoolExecutor(1, "merge") as worker:
        for layer in used:
            if not gaps:
                break
            # Bytes that a shorter disk in between did not have are gone, also if an older layer still holds them.
            limit = min(limit, layer.virtual_size)
            with ExitStack() as stack:
                data = _Feed(stack.enter_context(layer.open()), check, _Shifted(progress, done))
                sums = _Feed(stack.enter_context(layer.sums()), check, lambda done: None)
                gaps = _copy(layer, data, sums, gaps, _Disk(target, size, limit), worker=worker)
            done += layer.size
            progress(done)
    for offset, length, _ in gaps:
        _Disk(target, size, limit).zero(offset, length)
    progress(sum(layer.size for layer in used))


def _needed(layers: Sequence[Layer]) -> Sequence[Layer]:
    """The layers up to the first whole one."""
    for index, layer in enumerate(layers):
        if layer.whole:
            return layers[: index + 1]
    raise IntegrityError(
        "no layer of this disk is a whole one: the chain lacks its full"
        + (f" (its oldest is {layers[-1].name})" if layers else "")
    )


@dataclass(frozen=True, slots=True)
class _Shifted:
    """The progress of one layer as that of all."""

    progress: Callable[[int], None]
    before: int

    def __call__(self, done: int) -> None:
        self.progress(self.before + done)


class _Feed:
    """A sequential stream. No read is longer than 1 MiB, and before each a cancel is looked for."""

    def __init__(self, stream: BinaryIO, check: Callable[[], None], progress: Callable[[int], None]) -> None:
        self._stream = stream
        self._check = check
        self._progress = progress
        self.position = 0

    def read(self, length: int, /) -> bytes:
        """At most `length` of the next bytes; none at the end only."""
        self._check()
        data = self._stream.read(min(length, _STEP * CLUSTER))
        self.position += len(data)
        self._progress(self.position)
        return data

    def read_from(self, offset: int, length: int, what: str) -> bytes:
        """`length` bytes at `offset`; what lies before them is read and thrown away, as a stream has no other way."""
        while self.position < offset:
            read_exactly(self, min(offset - self.position, _STEP * CLUSTER), what)
        return read_exactly(self, length, what)


@dataclass(frozen=True, slots=True)
class _Disk:
    """The target as one layer sees it: it gives whole clusters; those past `limit` were gone, those past `size` are."""

    target: Target
    size: int
    limit: int

    def write(self, offset: int, data: memoryview) -> None:
        """Data of whole clusters."""
        if offset + len(data) > self.limit:
            data = memoryview(bytes(data[: self.limit - offset]).ljust(len(data), b"\0"))
        self.target.write(offset, data[: self.size - offset])

    def zero(self, offset: int, length: int) -> None:
        """Zeros of whole clusters."""
        self.target.zero(offset, min(length, self.size - offset))


@dataclass(frozen=True, slots=True)
class _Read:
    """Clusters that lie in a row in the file, with their digests, and where they belong: (guest offset, clusters)."""

    data: bytes
    sums: bytes
    places: list[tuple[int, int]]


def _copy(
    layer: Layer, data: _Feed, sums: _Feed, gaps: ExtentTable, disk: _Disk, *, worker: ThreadPoolExecutor
) -> ExtentTable:
    """Put what `layer` holds of `gaps` on the disk, and return what remains of them."""
    try:
        layout = StoredDisk.parse(
            data,
            layer.size,
            virtual_size=layer.virtual_size,
            tables_digest=layer.tables_digest,
            order=layer.order,
        )
    except IntegrityError as error:
        raise IntegrityError(f"{layer.name}: {error.message}", error.hint) from error
    within = [(0, clusters_of(disk.limit) * CLUSTER)]
    for offset, length, kind in intersect(intersect(layout.extents(), within), _ranges(gaps)):
        if kind is Kind.ZERO:
            disk.zero(offset, length)
    writing: Future[None] | None = None
    batch: list[_Read] = []
    wanted = intersect(intersect(layout.extents(), within), _ranges(gaps))
    for first, places in _reads(layout, wanted):
        count = sum(clusters for _, clusters in places)
        offset = layout.data_offset + first * CLUSTER
        content = data.read_from(offset, count * CLUSTER, layer.name)
        expected = sums.read_from(first * DIGEST, count * DIGEST, f"{layer.name}: the list of digests")
        batch.append(_Read(content, expected, places))
        if sum(len(read.data) for read in batch) >= _BATCH * CLUSTER:
            if writing:
                writing.result()
            writing = worker.submit(_place, layer, batch, disk)
            batch = []
    if writing:
        writing.result()
    _place(layer, batch, disk)
    for feed, end, what in (data, layout.size, ""), (sums, layout.clusters * DIGEST, ": the list of digests"):
        if feed.position == end and feed.read(1):
            raise IntegrityError(f"{layer.name}{what} goes on past its {end} bytes")
    rest = complement(intersect(layout.extents(), within), clusters_of(disk.size) * CLUSTER)
    return ExtentTable(intersect(gaps, rest))


def _ranges(table: ExtentTable) -> Iterator[tuple[int, int]]:
    return ((offset, length) for offset, length, _ in table)


def _reads(layout: Layout | ScatteredLayout, wanted: Iterable[Extent]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """(first data cluster, places) of the data in `wanted`, in file order, joined where the file has them in a row."""
    first = count = 0
    places: list[tuple[int, int]] = []
    for at, start, clusters in _in_file_order(layout, wanted):
        offset, index, end = at, start, start + clusters
        while index < end:
            if places and (index != first + count or count == _STEP):
                yield first, places
                places = []
            if not places:
                first, count = index, 0
            step = min(end - index, _STEP - count)
            places.append((offset, step))
            offset += step * CLUSTER
            index += step
            count += step
    if places:
        yield first, places


def _in_file_order(layout: Layout | ScatteredLayout, wanted: Iterable[Extent]) -> Iterable[tuple[int, int, int]]:
    """(guest offset, index in the file, clusters) of the data in `wanted`: the layer is one sequential stream."""
    found = (place for offset, length, kind in wanted if kind is Kind.DATA for place in layout.places(offset, length))
    return found if isinstance(layout, Layout) else sorted(found, key=_file_index)


def _file_index(place: tuple[int, int, int]) -> int:
    return place[1]


def _place(layer: Layer, batch: Sequence[_Read], disk: _Disk) -> None:
    """Check clusters against their digests, then give them to the disk."""
    for read in batch:
        view = memoryview(read.data)
        found = digests(view)
        if found != read.sums:
            raise _mismatch(layer, found, read)
        at = 0
        for offset, clusters in read.places:
            data = view[at * CLUSTER : (at + clusters) * CLUSTER]
            sums = read.sums[at * DIGEST : (at + clusters) * DIGEST]
            at += clusters
            put(disk, offset, data, sums)


def put(target: Target, offset: int, data: memoryview, sums: bytes) -> None:
    """Give `data` to the target, clusters of zeros as such: their digests tell which those are, for nothing.

    `sums` are the digests from its first cluster on. The last cluster may be cut.
    """
    if _ZERO_CLUSTER not in sums:
        target.write(offset, data)
        return

    def is_zero(at: int) -> bool:
        return sums[at // CLUSTER * DIGEST :][:DIGEST] == _ZERO_CLUSTER

    for zero, clusters in groupby(range(0, len(data), CLUSTER), is_zero):
        places = list(clusters)
        first, end = places[0], min(places[-1] + CLUSTER, len(data))
        if zero:
            target.zero(offset + first, end - first)
        else:
            target.write(offset + first, data[first:end])


def _mismatch(layer: Layer, found: bytes, read: _Read) -> IntegrityError:
    """The error that names the first cluster whose digest is wrong."""
    offsets = [offset + at * CLUSTER for offset, clusters in read.places for at in range(clusters)]
    starts = range(0, len(found), DIGEST)
    wrong = next(at for at in starts if found[at : at + DIGEST] != read.sums[at : at + DIGEST])
    return IntegrityError(
        f"{layer.name}: the {CLUSTER} bytes at the guest's offset {offsets[wrong // DIGEST]} are not those backed up",
        "Restore an increment older than this one, or from another datastore.",
    )
