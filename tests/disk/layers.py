"""Disks and their stored layers, made up: strategies for hypothesis, and a model of what a chain restores to."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3
from hypothesis import strategies as st

from backupcore.disk.extents import CLUSTER, Extent, Kind
from backupcore.disk.merge import Layer
from backupcore.disk.qcow2 import DiskArtifact, Layout, MemoryBlocks

SPAN = 8192 * CLUSTER
"""Guest bytes of one L2 table."""

ODD_SIZES = [1, 100, 511, 512, 513, 700, CLUSTER - 1, CLUSTER, CLUSTER + 1, CLUSTER + 512, 5 * CLUSTER + 700]


def clusters(size: int) -> int:
    return -(-size // CLUSTER)


@st.composite
def extents(draw: st.DrawFn, size: int, *, most: int = 12) -> list[Extent]:
    """Extents of whole clusters, near the start, the end or a border between L2 tables of a disk of `size` bytes."""
    end = clusters(size)
    found: list[Extent] = []
    starts = {0, max(0, end - most), *(max(0, border - 3) for border in range(8192, end, 8192))}
    place = 0
    for start in sorted(draw(st.sets(st.sampled_from(sorted(starts)), max_size=3))):
        place = max(place, start)
        for length, kind in draw(
            st.lists(st.tuples(st.integers(1, 3), st.sampled_from([None, Kind.DATA, Kind.ZERO])), max_size=most)
        ):
            length = min(length, end - place)  # noqa: PLW2901 - cut at the end of the disk
            if length and kind:
                found.append(Extent(place * CLUSTER, length * CLUSTER, kind))
            place += length
    return found


sizes = st.one_of(
    st.sampled_from(ODD_SIZES),
    st.integers(1, 40 * CLUSTER),
    st.sampled_from([SPAN - 700, SPAN, SPAN + 1, 2 * SPAN + CLUSTER, 3 * SPAN + 12345]),
)


@dataclass
class Made:
    """One layer as a store would give it back, and what it was made from."""

    extents: list[Extent]
    data: dict[int, bytes]  # guest offset -> the bytes of one data cluster, cut at the end of the disk
    layout: Layout
    file: bytes
    sums: bytes
    whole: bool

    def layer(self, name: str = "increment 0, disk vda", **changes: object) -> Layer:
        values: dict[str, object] = {
            "name": name,
            "open": lambda: io.BytesIO(self.file),
            "sums": lambda: io.BytesIO(self.sums),
            "size": self.layout.size,
            "virtual_size": self.layout.virtual_size,
            "whole": self.whole,
            "tables_digest": self.layout.tables_digest(),
        }
        return Layer(**{**values, **changes})  # type: ignore[arg-type]  # as dataclasses.replace would


class SparseBlocks(MemoryBlocks):
    """A disk of which only the given clusters hold anything; reading others is an error."""

    def __init__(self, data: dict[int, bytes]) -> None:
        super().__init__(b"")
        self._clusters = data

    def connect(self) -> SparseBlocks:
        return self

    def read_into(self, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            piece = self._clusters[offset + done]
            buffer[done : done + len(piece)] = piece
            done += len(piece)


def make(size: int, found: Sequence[Extent], *, whole: bool = True, seed: int = 0) -> Made:
    """A layer with data of its own; one data cluster in eight is all zeros."""
    source = random.Random(seed)
    data: dict[int, bytes] = {}
    for extent in found:
        if extent.kind is Kind.DATA:
            for offset in range(extent.offset, extent.end, CLUSTER):
                length = min(CLUSTER, size - offset)
                data[offset] = bytes(length) if source.random() < 0.125 else source.randbytes(length)
    layout = Layout(size, found)
    artifact = DiskArtifact("disk.vda.qcow2", layout, SparseBlocks(data))
    file = artifact.open().read()
    sums = b"".join(blake3(file[at : at + CLUSTER]).digest() for at in range(layout.data_offset, layout.size, CLUSTER))
    return Made(list(found), data, layout, file, sums, whole)


class Model:
    """The truth: a disk as a dict of clusters that are not zero, changed as a guest and its owner would."""

    def __init__(self) -> None:
        self.size = 0
        self.clusters: dict[int, bytes] = {}

    def resize(self, size: int) -> None:
        if size < self.size:
            self.clusters = {
                offset: data[: size - offset].ljust(CLUSTER, b"\0")
                for offset, data in self.clusters.items()
                if offset < size
            }
        self.size = size

    def apply(self, layer: Made) -> None:
        """The state at a layer's point, from the state at its parent's."""
        if layer.whole:
            self.clusters = {}
        self.resize(layer.layout.virtual_size)
        for extent in layer.extents:
            for offset in range(extent.offset, extent.end, CLUSTER):
                self.clusters.pop(offset, None)
        self.clusters.update({offset: data.ljust(CLUSTER, b"\0") for offset, data in layer.data.items()})

    def write_raw(self, path: Path) -> None:
        """As a raw file, sparse, padded to sectors as QEMU pads it."""
        with path.open("wb") as file:
            for offset, data in self.clusters.items():
                file.seek(offset)
                file.write(data)
            file.truncate(-(-self.size // 512) * 512)

    def nonzero(self) -> dict[int, bytes]:
        """Guest offset -> bytes of a cluster, cut at the end of the disk."""
        cut = {offset: data[: self.size - offset] for offset, data in self.clusters.items()}
        return {offset: data for offset, data in cut.items() if any(data)}


class Recording:
    """A Target that remembers, and refuses to be given a byte twice."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.data: dict[int, bytes] = {}
        self.given: list[tuple[int, int]] = []

    def write(self, offset: int, data: memoryview) -> None:
        self.given.append((offset, len(data)))
        for at in range(0, len(data), CLUSTER):
            self.data[offset + at] = bytes(data[at : at + CLUSTER])

    def zero(self, offset: int, length: int) -> None:
        self.given.append((offset, length))

    def check_complete(self) -> None:
        end = 0
        for offset, length in sorted(self.given):
            assert offset == end, f"{offset} after {end}"
            end += length
        assert end == self.size


@st.composite
def chains(draw: st.DrawFn, longest: int = 20, *, sectors: bool = False) -> list[Made]:
    """Layers, oldest first. Sizes change now and then; a layer in the middle may be whole.

    With `sectors` a disk is cut at the end of a sector: QEMU's chains know no other place.
    """
    some = st.one_of(st.integers(1, 40 * CLUSTER), st.sampled_from(ODD_SIZES))
    size = draw(some)
    found: list[Made] = []
    for number in range(draw(st.integers(1, longest))):
        if number and draw(st.integers(0, 3)) == 0:
            before, size = size, draw(some)
            if sectors and size < before:
                size = -(-size // 512) * 512
        whole = number == 0 or draw(st.integers(0, 9)) == 9
        found.append(make(size, draw(extents(size)), whole=whole, seed=draw(st.integers(0, 1 << 30))))
    return found
