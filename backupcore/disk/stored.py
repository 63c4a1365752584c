"""The reader that trusts nothing: the qcow2 tables of a layer as they came back from a store.

Accepted is what `backupcore.disk.qcow2` writes, bit for bit, or where the manifest says so what
`backupcore.disk.scattered` does, and nothing else; no other qcow2 file is ever opened. The
virtual size (from the manifest) and the length of the file fix header, refcounts and the place of every table, so
those are compared with what they have to be. L1 and L2 entries may only be what comes next. Nothing that the file says
is used as a length or an offset before that, so memory goes by the virtual size that the manifest told: 25 bytes for
each extent, of which a disk has at most one per cluster.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from struct import Struct
from typing import Literal, Protocol

from blake3 import blake3

from backupcore.disk.extents import CLUSTER, Extent, Kind
from backupcore.disk.geometry import COPIED, ENTRIES, HEADER, L2_SPAN, MAGIC, ZERO, Geometry, clusters_of, row
from backupcore.disk.qcow2 import Layout
from backupcore.disk.scattered import ScatteredLayout
from backupcore.errors import IntegrityError, UnsupportedOperation

__all__ = ["Order", "Readable", "StoredDisk", "read_exactly"]

Order = Literal["guest", "file"]
"""How the data clusters of a stored disk lie: in guest order, without gaps, or as a store's own copies put them."""

_COMPRESSED = 1 << 62  # in an L2 entry
_WORD = 8
_TABLE = Struct(f">{ENTRIES}Q")
_RUN = 128  # entries of an L2 table that are compared at once where any may follow
_HOLES = bytes(CLUSTER)  # an L2 table without entries
_ZEROS = ZERO.to_bytes(_WORD, "big") * ENTRIES  # one of explicit zero clusters only
_INCOMPATIBLE = ("dirty bit", "corrupt bit", "external data file", "compression type", "extended L2 entries")


class Readable(Protocol):
    """What is needed of a stream; every BinaryIO has it."""

    def read(self, length: int, /) -> bytes:
        """At most `length` of the next bytes; none at the end only."""


def read_exactly(stream: Readable, length: int, what: str) -> bytes:
    """The next `length` bytes of `stream`; IntegrityError naming `what` if it ends before."""
    data = stream.read(length)
    if len(data) == length:
        return data
    # A pipe may give less than was asked for without being at its end.
    pieces = [data]
    missing = length - len(data)
    while missing > 0 and pieces[-1]:
        pieces.append(stream.read(missing))
        missing -= len(pieces[-1])
    if missing:
        raise IntegrityError(f"{what} ends too early: {missing} of the next {length} bytes are missing")
    return b"".join(pieces)


class StoredDisk:
    """A stored layer while its tables are being read; `parse` is the way in."""

    @classmethod
    def parse(
        cls, stream: Readable, size: int, *, virtual_size: int, tables_digest: bytes | None, order: Order = "guest"
    ) -> Layout | ScatteredLayout:
        """Read ``[0, data_offset)`` of a file of `size` bytes from a sequential stream, and return its layout.

        `virtual_size`, `tables_digest` (32 bytes; None where it is not known) and `order` come from the manifest.
        Without the digest one thing cannot be noticed: that an unlisted cluster has become one of zeros, or the
        reverse; and where the order is ``file``, that clusters have changed places.

        Raises IntegrityError, which says what is wrong; what the stream itself raises passes through.
        """
        if order == "file":
            return _StoredScattered(stream, size, virtual_size)._parse(tables_digest)
        return cls(stream, size, virtual_size)._parse(tables_digest)

    _dead = 0
    """Data clusters that may be dead, for each that the disk can have."""

    def __init__(self, stream: Readable, size: int, virtual_size: int) -> None:
        if virtual_size <= 0:
            raise IntegrityError(f"a disk of {virtual_size} bytes cannot be")
        clusters = clusters_of(virtual_size)
        try:
            largest = Geometry.around(virtual_size, clusters * (1 + self._dead) + -(-clusters // ENTRIES))
        except UnsupportedOperation as error:
            raise IntegrityError(error.message) from error
        self._place = Geometry(virtual_size, size // CLUSTER)
        if size % CLUSTER or not self._place.l2 <= self._place.clusters <= largest.clusters:
            raise IntegrityError(f"a qcow2 file of {size} bytes cannot be a backup of a disk of {virtual_size} bytes")
        self._stream = stream
        self._hasher = blake3()

    def _parse(self, digest: bytes | None) -> Layout | ScatteredLayout:
        place = self._place
        if (found := self._next()) != (expected := place.header()):
            raise IntegrityError(f"the qcow2 header {_difference(found, expected)}")
        for index in range(place.refcount_table):
            if self._next() != place.refcount_table_cluster(index):
                raise IntegrityError(f"cluster {index} of the qcow2 refcount table is damaged")
        for index in range(place.refcount_blocks):
            self._refcount_block(index, self._next())
        tables = self._l1()
        self._next_data = (place.l2 + len(tables)) * CLUSTER
        layout = self._layout(tables)
        if layout.size != place.clusters * CLUSTER:
            raise IntegrityError(f"the qcow2 file maps {layout.size} of its {place.clusters * CLUSTER} bytes")
        if digest is not None and self._hasher.digest() != digest:
            raise IntegrityError("the qcow2 tables are not those that were written: their digest differs")
        return layout

    def _refcount_block(self, index: int, found: bytes) -> None:
        if found != self._place.refcount_block(index):
            raise IntegrityError(f"the qcow2 refcount block {index} is damaged")

    def _layout(self, tables: array[int]) -> Layout | ScatteredLayout:
        return Layout(self._place.virtual_size, self._extents(tables))

    def _next(self) -> bytes:
        data = read_exactly(self._stream, CLUSTER, "the qcow2 file")
        self._hasher.update(data)
        return data

    def _l1(self) -> array[int]:
        """The indexes of the L2 tables that exist."""
        place = self._place
        found = array("I")
        for first in range(0, clusters_of(place.l1_entries * _WORD) * ENTRIES, ENTRIES):
            raw = self._next()
            if raw == _HOLES:
                continue
            for index, entry in enumerate(_TABLE.unpack(raw)):
                if not entry:
                    continue
                expected = COPIED | (place.l2 + len(found)) * CLUSTER
                if first + index >= place.l1_entries:
                    raise IntegrityError(f"qcow2 L1 entry {first + index} lies past the end of the disk")
                if entry != expected or place.l2 + len(found) >= place.clusters:
                    raise IntegrityError(f"qcow2 L1 entry {first + index} {self._reason(entry, expected)}")
                found.append(first + index)
        return found

    def _extents(self, tables: array[int]) -> Iterator[Extent]:
        for raw, start, entries in self._l2(tables):
            yield from self._table(raw, start, entries)

    def _l2(self, tables: array[int]) -> Iterator[tuple[bytes, int, int]]:
        """Each L2 table, the guest offset of its first cluster, and how many entries it has before the disk's end."""
        for index in tables:
            raw = self._next()
            if raw == _HOLES:
                raise IntegrityError(f"the qcow2 L2 table {index} is empty")
            start = index * L2_SPAN
            entries = min(ENTRIES, clusters_of(self._place.virtual_size - start))
            if raw[entries * _WORD :].strip(b"\0"):
                raise IntegrityError(f"the qcow2 L2 table {index} goes on past the end of the disk")
            yield raw, start, entries

    def _table(self, raw: bytes, start: int, entries: int) -> Iterator[Extent]:
        """The extents of one L2 table whose first cluster is at the guest offset `start`."""
        target = COPIED | self._next_data
        left = min(ENTRIES, self._place.clusters - self._next_data // CLUSTER)
        data = row(target, left)  # all that may come, in order
        used = index = 0
        while index < entries:
            offset = start + index * CLUSTER
            if length := _common(raw, index, _HOLES, index, entries):
                pass
            elif length := _common(raw, index, data, used, entries):
                yield Extent(offset, length * CLUSTER, Kind.DATA)
                used += length
            elif length := _common(raw, index, _ZEROS, index, entries):
                yield Extent(offset, length * CLUSTER, Kind.ZERO)
            else:
                entry = int.from_bytes(raw[index * _WORD : (index + 1) * _WORD], "big")
                reason = self._reason(entry, target + used * CLUSTER)
                raise IntegrityError(f"the qcow2 L2 entry for the guest's offset {offset} {reason}")
            index += length
        self._next_data += used * CLUSTER

    def _reason(self, entry: int, expected: int) -> str:
        """Why an entry is refused."""
        offset = entry & ~COPIED
        if entry & _COMPRESSED:
            return "is a compressed cluster"
        if offset % CLUSTER:
            return f"points to byte {offset}, which is no cluster's start"
        if offset >= self._place.clusters * CLUSTER:
            return f"points to byte {offset}, past the end of the file"
        if not entry & COPIED:
            return "lacks the mark of a cluster that is used once"
        if entry == expected:
            return f"points to byte {offset}, among the tables"
        return f"points to byte {offset} instead of {expected & ~COPIED}, the next in order"


class _StoredScattered(StoredDisk):
    """A stored full whose data clusters lie in another order than the guest's (`backupcore.disk.scattered`)."""

    _dead = 1

    def _refcount_block(self, index: int, found: bytes) -> None:
        """Which clusters are dead is known after the L2 tables only: `_layout` compares."""

    def _layout(self, tables: array[int]) -> ScatteredLayout:
        place = self._place
        data = place.clusters - self._next_data // CLUSTER
        if data < 0:
            raise IntegrityError("the qcow2 file ends within its tables")
        try:
            layout = ScatteredLayout(place.virtual_size, self._pieces(tables, data), data)
        except ValueError as error:
            raise IntegrityError(f"the qcow2 L2 tables are damaged: {error}") from error
        # All tables follow from the pieces, so what was read is compared as a whole.
        if layout.size == place.clusters * CLUSTER and layout.tables_digest() != self._hasher.digest():
            raise IntegrityError("the qcow2 refcount blocks are damaged")
        return layout

    def _pieces(self, tables: array[int], data: int) -> Iterator[tuple[int, int, int]]:
        low = self._next_data
        for raw, start, entries in self._l2(tables):
            index = 0
            while index < entries:
                offset = start + index * CLUSTER
                if length := _common(raw, index, _HOLES, index, entries):
                    index += length
                    continue
                entry = int.from_bytes(raw[index * _WORD : (index + 1) * _WORD], "big")
                first = ((entry & ~COPIED) - low) // CLUSTER
                if not entry & COPIED or (entry & ~COPIED) % CLUSTER or not 0 <= first < data:
                    reason = self._reason(entry, entry)
                    raise IntegrityError(f"the qcow2 L2 entry for the guest's offset {offset} {reason}")
                length = _common(raw, index, row(entry, min(_RUN, data - first)), 0, entries)
                yield offset, length * CLUSTER, first
                index += length


def _common(one: bytes, first: int, other: bytes, second: int, end: int) -> int:
    """How many table entries from ``one[first]`` (before `end`) equal those from ``other[second]``."""
    limit = min(end - first, len(other) // _WORD - second)
    # In steps that grow, as runs are short or very long; what differs first in a step is seen in its two numbers.
    done, step = 0, 8
    while done < limit:
        step = min(step, limit - done)
        mine = one[(first + done) * _WORD : (first + done + step) * _WORD]
        theirs = other[(second + done) * _WORD : (second + done + step) * _WORD]
        if mine != theirs:
            differing = int.from_bytes(mine, "big") ^ int.from_bytes(theirs, "big")
            return done + step - -(-differing.bit_length() // 64)
        done += step
        step *= 8
    return done


def _difference(found: bytes, expected: bytes) -> str:
    """What is wrong with a header."""
    if found[:4] != MAGIC:
        return "is none: the magic number is missing"
    names = (
        "magic",
        "version",
        "backing file's offset",
        "backing file name's length",
        "cluster size",
        "virtual size",
        "encryption method",
        "L1 size",
        "L1 offset",
        "refcount table's offset",
        "refcount table's size",
        "number of snapshots",
        "snapshots' offset",
        "incompatible features",
        "compatible features",
        "autoclear features",
        "refcount width",
        "header length",
    )
    for name, is_, due in zip(names, HEADER.unpack_from(found), HEADER.unpack_from(expected), strict=True):
        if is_ == due:
            continue
        if name.startswith("backing file"):
            return "names a backing file"
        if name == "incompatible features":
            bits = [bit for bit in range(64) if is_ >> bit & 1]
            known = [_INCOMPATIBLE[bit] if bit < len(_INCOMPATIBLE) else f"unknown bit {bit}" for bit in bits]
            return f"asks for incompatible features: {', '.join(known)}"
        return f"has {is_} as {name} where {due} is due"
    return "holds extensions or other bytes that no backup has"
