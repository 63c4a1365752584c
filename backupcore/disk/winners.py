"""Which layer every cluster of a merged disk comes from, found out from the layers' tables alone.

A restore takes the layers one by one and writes a disk in whatever order they come. A flatten makes an artifact, whose
tables stand before its data: so here all layers are laid over one another first, and each data cluster of the result is
known by its layer and its place in that layer's file.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from backupcore.disk.extents import CLUSTER, Extent, Kind
from backupcore.disk.geometry import clusters_of
from backupcore.disk.qcow2 import Layout
from backupcore.disk.scattered import ScatteredLayout

__all__ = ["Winners", "Run", "Runs", "winners", "winners_as_they_lie"]


class _Piece(NamedTuple):
    offset: int
    end: int
    layer: int  # -1: zeros


class Run(NamedTuple):
    """`clusters` data clusters from `first` on of a result, which lie in a row in the file of `layer`, from `at` on."""

    first: int
    layer: int
    at: int
    clusters: int


class Runs:
    """Where each data cluster of a result comes from, in the result's file order. 20 bytes for each run."""

    def __init__(self, runs: Iterable[tuple[int, int, int]]) -> None:
        """`runs` are (layer, index, clusters)."""
        self._firsts, self._layers, self._indexes = array("Q"), array("I"), array("Q")
        self.clusters = 0
        for layer, index, count in runs:
            if self._firsts and self._layers[-1] == layer:
                before = self.clusters - self._firsts[-1]
                if self._indexes[-1] + before == index:
                    self.clusters += count
                    continue
            self._firsts.append(self.clusters)
            self._layers.append(layer)
            self._indexes.append(index)
            self.clusters += count

    def __len__(self) -> int:
        return len(self._firsts)

    def __iter__(self) -> Iterator[Run]:
        return self.within(0, self.clusters)

    def by_layer(self) -> Iterator[tuple[int, Iterator[Run]]]:
        """The runs of each layer that has any, as they lie in its file; oldest layer first."""
        numbers: dict[int, array[int]] = {}
        for number, layer in enumerate(self._layers):
            numbers.setdefault(layer, array("Q")).append(number)
        for layer in sorted(numbers):
            yield layer, map(self._run, sorted(numbers[layer], key=self._indexes.__getitem__))

    def _run(self, number: int) -> Run:
        first = self._firsts[number]
        after = self._firsts[number + 1] if number + 1 < len(self._firsts) else self.clusters
        return Run(first, self._layers[number], self._indexes[number], after - first)

    def within(self, first: int, count: int) -> Iterator[Run]:
        """The runs of the clusters ``[first, first + count)``, cut to them."""
        end = first + count
        number = max(0, bisect_right(self._firsts, first) - 1)
        while first < end:
            start = self._firsts[number]
            after = self._firsts[number + 1] if number + 1 < len(self._firsts) else self.clusters
            step = min(after, end) - first
            yield Run(first, self._layers[number], self._indexes[number] + first - start, step)
            first += step
            number += 1


@dataclass(frozen=True)
class Winners:
    """A merged disk: its layout, the runs of its data clusters, and which of them are cut.

    `cut` maps a data cluster of the result to how many of its bytes count; the rest of it is zeros. That is the one at
    the end of a layer on whose disk a smaller one followed.
    """

    layout: Layout | ScatteredLayout
    runs: Runs
    cut: dict[int, int]

    @property
    def dead(self) -> int:
        """Data clusters that are in the file, but that nothing refers to."""
        return self.layout.clusters - self.layout.live if isinstance(self.layout, ScatteredLayout) else 0


class _Laid:
    """Layers of one disk, oldest first, laid over one another. The oldest is whole."""

    def __init__(self, layouts: Sequence[Layout | ScatteredLayout]) -> None:
        self.layouts = layouts
        self.size = layouts[-1].virtual_size
        limits = [self.size]
        for layout in reversed(layouts[:-1]):
            # Bytes that a shorter disk in between did not have are gone, also if an older layer still holds them.
            limits.append(min(limits[-1], layout.virtual_size))
        self.limits = limits[::-1]
        self._offsets, self._ends, self._layers = array("Q"), array("Q"), array("I")
        for offset, end, layer in _tree([self._pieces(number) for number in range(len(layouts))]):
            if layer < 0:
                continue  # what a full says nothing of reads as zeros
            self._offsets.append(offset)
            self._ends.append(end)
            self._layers.append(layer)

    def _pieces(self, number: int) -> Iterator[_Piece]:
        limit = clusters_of(self.limits[number]) * CLUSTER
        for offset, length, kind in self.layouts[number].extents():
            if offset < limit:
                yield _Piece(offset, min(offset + length, limit), number if kind is Kind.DATA else -1)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """(guest offset, end, layer) of all data, in guest order."""
        return zip(self._offsets, self._ends, self._layers, strict=True)

    def places(self) -> Iterator[tuple[int, int, int, int]]:
        """(guest offset, layer, index in its file, clusters) of all data, in guest order."""
        for offset, end, layer in self:
            for start, index, count in self.layouts[layer].places(offset, end - offset):
                yield start, layer, index, count

    def cut(self, offset: int, layer: int, count: int) -> int | None:
        """How many bytes count of the last of `count` clusters from `offset` on, where not all of them do."""
        end = offset + count * CLUSTER
        limit = self.limits[layer]
        # The end of the layer's own disk, or of the result's where no layer was longer, is no cut: zeros follow there.
        return limit - (end - CLUSTER) if end > limit and self.layouts[layer].virtual_size > limit else None


def winners(layouts: Sequence[Layout | ScatteredLayout]) -> Winners:
    """The disk that `layouts`, oldest first, make up, compact and in guest order. The oldest must be whole.

    The newest decides the size; what lies past the end of a layer that is shorter than those around it reads as zeros.
    """
    laid = _Laid(layouts)
    layout = Layout(laid.size, (Extent(offset, end - offset, Kind.DATA) for offset, end, _ in laid))
    cut: dict[int, int] = {}

    def runs() -> Iterator[tuple[int, int, int]]:
        done = 0
        for offset, layer, index, count in laid.places():
            done += count
            if (left := laid.cut(offset, layer, count)) is not None:
                cut[done - 1] = left
            yield layer, index, count

    return Winners(layout, Runs(runs()), cut)


def winners_as_they_lie(layouts: Sequence[Layout | ScatteredLayout]) -> Winners:
    """The same disk for a store that copies on its own side: the data of the oldest layer as they lie, dead ones too,
    then those of the others that count, oldest layer first and each in the order of its file.
    """
    laid = _Laid(layouts)
    newer: list[tuple[int, int, int, int]] = []  # (layer, index, clusters, guest offset)
    pieces: list[tuple[int, int, int]] = []  # (guest offset, bytes, index in the result)
    cut: dict[int, int] = {}
    for offset, layer, index, count in laid.places():
        if layer:
            newer.append((layer, index, count, offset))
            continue
        pieces.append((offset, count * CLUSTER, index))
        if (left := laid.cut(offset, layer, count)) is not None:
            cut[index + count - 1] = left
    newer.sort()
    base = layouts[0].clusters
    end = base
    for layer, _, count, offset in newer:
        pieces.append((offset, count * CLUSTER, end))
        end += count
        if (left := laid.cut(offset, layer, count)) is not None:
            cut[end - 1] = left
    pieces.sort()
    whole = [(0, 0, base)] if base else []
    runs = Runs([*whole, *((layer, index, count) for layer, index, count, _ in newer)])
    return Winners(ScatteredLayout(laid.size, pieces, end), runs, cut)


def _tree(layers: Sequence[Iterable[_Piece]]) -> Iterator[_Piece]:
    """The layers, oldest first, over one another; as a tree of pairs, so that a piece passes few of them."""
    if len(layers) == 1:
        return iter(layers[0])
    half = len(layers) // 2
    return _over(_tree(layers[half:]), _tree(layers[:half]))


def _over(newer: Iterator[_Piece], older: Iterator[_Piece]) -> Iterator[_Piece]:
    """Sorted pieces of two layers: all of the newer, and what they leave of the older."""
    under = next(older, None)
    for piece in newer:
        while under is not None and under.offset < piece.offset:
            if under.end <= piece.offset:
                yield under
                under = next(older, None)
            else:
                yield under._replace(end=piece.offset)
                under = under._replace(offset=piece.offset)
        while under is not None and under.end <= piece.end:
            under = next(older, None)
        if under is not None and under.offset < piece.end:
            under = under._replace(offset=piece.end)
        yield piece
    if under is not None:
        yield under
    yield from older
