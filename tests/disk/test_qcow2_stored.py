"""The reader of stored layers: it takes what the writer makes, and refuses all else before it costs anything."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backupcore.disk.extents import CLUSTER, Extent, Kind
from backupcore.disk.qcow2 import Layout
from backupcore.disk.stored import StoredDisk
from backupcore.errors import IntegrityError
from tests.disk.layers import SPAN, Made, extents, make, sizes
from tests.disk.qemu_nbd import run

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
soak = settings(quick, max_examples=5000)

layers = sizes.flatmap(lambda size: st.builds(make, st.just(size), extents(size)))


def parse(file: bytes, made: Made, *, digest: bool = True, size: int | None = None) -> Layout:
    return StoredDisk.parse(
        io.BytesIO(file),
        made.layout.size if size is None else size,
        virtual_size=made.layout.virtual_size,
        tables_digest=blake3(made.file[: made.layout.data_offset]).digest() if digest else None,
    )


class Dripping(io.BytesIO):
    """A stream that gives less than it is asked for, as pipes do."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(size or 0, 7777))


@quick
@given(made=layers)
def test_what_the_writer_made_is_read_back(made: Made):
    stream = Dripping(made.file)
    layout = StoredDisk.parse(
        stream,
        made.layout.size,
        virtual_size=made.layout.virtual_size,
        tables_digest=made.layout.tables_digest(),
    )
    assert layout == made.layout
    assert (layout.size, layout.data_offset, layout.clusters) == (
        made.layout.size,
        made.layout.data_offset,
        made.layout.clusters,
    )
    assert stream.tell() == layout.data_offset


def one_flipped_bit(made: Made, data: st.DataObject) -> None:
    # Where the bytes mean something, more often than in the padding.
    place = made.layout.data_offset
    inside = st.integers(0, place - 1)
    starts = st.builds(
        lambda cluster, at: cluster * CLUSTER + at, st.integers(0, place // CLUSTER - 1), st.integers(0, 130)
    )
    at = data.draw(st.one_of(inside, starts))
    damaged = bytearray(made.file)
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(IntegrityError):
        parse(bytes(damaged), made)
    try:
        layout = parse(bytes(damaged), made, digest=False)
    except IntegrityError:
        return
    # Without the digest, "not listed" may have become "zeros" or the reverse: another valid file, and no other kind.
    assert layout.tables(0, layout.data_offset) == damaged[:place]


@quick
@given(made=layers, data=st.data())
def test_a_flipped_bit_in_the_tables_is_refused(made: Made, data: st.DataObject):
    one_flipped_bit(made, data)


@pytest.mark.soak
@soak
@given(made=layers, data=st.data())
def test_many_flipped_bits_in_the_tables_are_refused(made: Made, data: st.DataObject):
    one_flipped_bit(made, data)


@quick
@given(made=layers, data=st.data())
def test_rubbish_is_refused_or_is_a_layout(made: Made, data: st.DataObject):
    damaged = bytearray(made.file)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, made.layout.data_offset // 8 - 1)) * 8
        word = data.draw(
            st.one_of(
                st.binary(min_size=8, max_size=8),
                st.sampled_from([0, 1, CLUSTER, 1 << 63 | CLUSTER, made.layout.size, (1 << 64) - 1]).map(
                    lambda value: value.to_bytes(8, "big")
                ),
            )
        )
        damaged[at : at + 8] = word
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    size = data.draw(st.sampled_from([None, len(damaged), made.layout.size + CLUSTER, 1 << 60, 0, -CLUSTER]))
    try:
        layout = parse(bytes(damaged), made, digest=False, size=size)
    except IntegrityError:
        return
    assert layout.tables(0, layout.data_offset) == damaged[: layout.data_offset]


def field(offset: int, form: str, value: int) -> Callable[[bytearray], None]:
    def change(file: bytearray) -> None:
        struct.pack_into(f">{form}", file, offset, value)

    return change


DISK = make(
    2 * SPAN + 5 * CLUSTER,
    [
        Extent(0, 2 * CLUSTER, Kind.DATA),
        Extent(3 * CLUSTER, CLUSTER, Kind.ZERO),
        Extent(2 * SPAN, 2 * CLUSTER, Kind.DATA),
    ],
)
# In clusters: 0 header, 1 refcount table, 2 refcount block, 3 L1, 4 and 5 L2 (of the disk's first and third 512 MiB)
L1, L2, SECOND_L2, DATA = 3 * CLUSTER, 4 * CLUSTER, 5 * CLUSTER, 6 * CLUSTER
USED = 1 << 63


def backing(file: bytearray) -> None:
    struct.pack_into(">QI", file, 8, 512, 11)
    file[512:523] = b"/etc/shadow"


HOSTILE = {
    "another magic number": (field(0, "I", 0x7F454C46), "magic number"),
    "version 2": (field(4, "I", 2), "2 as version"),
    "version 4": (field(4, "I", 4), "4 as version"),
    "a backing file": (backing, "names a backing file"),
    "a backing name without a place": (field(16, "I", 9), "names a backing file"),
    "a backing place without a name": (field(8, "Q", 104), "names a backing file"),
    "small clusters": (field(20, "I", 9), "cluster size"),
    "giant clusters": (field(20, "I", 63), "cluster size"),
    "another size": (field(24, "Q", 4096), "virtual size"),
    "a giant size": (field(24, "Q", (1 << 64) - 1), "virtual size"),
    "encryption": (field(32, "I", 1), "encryption"),
    "LUKS": (field(32, "I", 2), "encryption"),
    "a giant L1 table": (field(36, "I", 0xFFFFFFFF), "L1 size"),
    "no L1 table": (field(36, "I", 0), "L1 size"),
    "an L1 table elsewhere": (field(40, "Q", 1 << 62), "L1 offset"),
    "an L1 table that is the header": (field(40, "Q", 0), "L1 offset"),
    "a refcount table elsewhere": (field(48, "Q", 1 << 62), "refcount table's offset"),
    "a giant refcount table": (field(56, "I", 0xFFFFFFFF), "refcount table's size"),
    "snapshots": (field(60, "I", 1), "snapshots"),
    "a place for snapshots": (field(64, "Q", CLUSTER), "snapshots"),
    "the dirty bit": (field(72, "Q", 1), "dirty bit"),
    "the corrupt bit": (field(72, "Q", 2), "corrupt bit"),
    "an external data file": (field(72, "Q", 4), "external data file"),
    "a compression type": (field(72, "Q", 8), "compression type"),
    "extended L2 entries": (field(72, "Q", 16), "extended L2"),
    "an unknown feature": (field(72, "Q", 1 << 40), "unknown bit 40"),
    "lazy refcounts": (field(80, "Q", 1), "compatible features"),
    "bitmaps": (field(88, "Q", 1), "autoclear"),
    "1-bit refcounts": (field(96, "I", 0), "refcount width"),
    "another header length": (field(100, "I", 112), "header length"),
    "a header extension": (field(104, "I", 0x44415441), "extensions"),
    "a stray byte in the header": (field(CLUSTER - 1, "B", 1), "other bytes"),
    "a refcount block elsewhere": (field(CLUSTER, "Q", 1 << 50), "refcount table"),
    "two refcount blocks": (field(CLUSTER + 8, "Q", 2 * CLUSTER), "refcount table"),
    "a refcount of 2": (field(2 * CLUSTER + 12, "H", 2), "refcount block 0"),
    "a refcount of 0": (field(2 * CLUSTER, "H", 0), "refcount block 0"),
    "a refcount past the end": (field(3 * CLUSTER - 2, "H", 1), "refcount block 0"),
    "an L2 table outside": (field(L1, "Q", USED | 1 << 40), "past the end of the file"),
    "an L2 table that is the L1 table": (field(L1, "Q", USED | L1), f"byte {L1} instead of {L2}"),
    "an L2 table used twice": (field(L1 + 16, "Q", USED | L2), f"byte {L2} instead of {SECOND_L2}"),
    "an L2 table between clusters": (field(L1, "Q", USED | (L2 + 512)), "no cluster's start"),
    "an L2 table not marked as used": (field(L1, "Q", L2), "used once"),
    "an L2 table past the disk": (field(L1 + 24, "Q", USED | DATA), "L1 entry 3 lies past the end of the disk"),
    "a missing L2 table": (field(L1 + 16, "Q", 0), "next in order|maps|points"),
    "a third L2 table, where data are": (field(L1 + 8, "Q", USED | SECOND_L2), "instead of"),
    "a cluster outside": (field(L2, "Q", USED | 1 << 55), "offset 0 points to byte .* past the end of the file"),
    "a cluster just outside": (field(SECOND_L2 + 16, "Q", USED | DISK.layout.size), "past the end of the file"),
    "a cluster between clusters": (field(L2, "Q", USED | (DATA + 1)), "no cluster's start"),
    "a cluster used twice": (field(L2 + 8, "Q", USED | DATA), f"offset {CLUSTER} points to byte {DATA} instead of"),
    "clusters out of order": (field(L2, "Q", USED | (DATA + CLUSTER)), "instead of"),
    "a loop to its own table": (field(L2, "Q", USED | L2), "instead of"),
    "a cluster that is the header": (field(L2, "Q", USED), "byte 0 instead of"),
    "a compressed cluster": (field(L2, "Q", 1 << 62 | DATA), "compressed"),
    "a cluster with two users": (field(L2, "Q", DATA), "used once"),
    "a zero cluster with data": (field(L2, "Q", USED | DATA | 1), "no cluster's start"),
    "an entry past the disk": (field(SECOND_L2 + 5 * 8, "Q", 1), "goes on past the end of the disk"),
    "a cluster that nothing maps": (field(SECOND_L2 + 8, "Q", 0), "maps .* of its"),
    "one cluster too many": (field(L2 + 16, "Q", USED | (DATA + 2 * CLUSTER)), "instead of|past the end"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_little_memory(name: str):
    change, message = HOSTILE[name]
    file = bytearray(DISK.file)
    change(file)
    content = bytes(file)
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError, match=message):
            parse(content, DISK, digest=False)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(IntegrityError):
        parse(content, DISK)


def test_an_empty_table_is_refused():
    file = bytearray(DISK.file)
    file[L2 : L2 + CLUSTER] = bytes(CLUSTER)
    with pytest.raises(IntegrityError, match="L2 table 0 is empty"):
        parse(bytes(file), DISK, digest=False)


def test_zeros_that_were_not_written_are_noticed_by_the_digest():
    file = bytearray(DISK.file)
    field(L2 + 32, "Q", 1)(file)
    assert parse(bytes(file), DISK, digest=False) != DISK.layout
    with pytest.raises(IntegrityError, match="digest differs"):
        parse(bytes(file), DISK)


@pytest.mark.parametrize("end", [0, 1, CLUSTER, L1, L2 + 5, DATA - 1])
def test_a_file_that_ends_within_its_tables_is_refused(end: int):
    with pytest.raises(IntegrityError, match="ends too early"):
        parse(DISK.file[:end], DISK)


@pytest.mark.parametrize(
    "size", [-1, 0, 1, CLUSTER, 3 * CLUSTER, DISK.layout.size - 1, DISK.layout.size + 1, 5 * SPAN, 1 << 62, 1 << 80]
)
def test_a_length_that_cannot_be_is_refused_unread(size: int):
    stream = io.BytesIO(DISK.file)
    with pytest.raises(IntegrityError, match="cannot be a backup of"):
        StoredDisk.parse(stream, size, virtual_size=DISK.layout.virtual_size, tables_digest=None)
    assert stream.tell() == 0


@pytest.mark.parametrize("size", [DISK.layout.size - CLUSTER, DISK.layout.size + CLUSTER])
def test_another_length_than_the_file_was_made_with_is_refused(size: int):
    with pytest.raises(IntegrityError, match="refcount block 0"):
        parse(DISK.file, DISK, size=size)


@pytest.mark.parametrize(
    "virtual_size", [-1, 0, 1, 2 * SPAN, DISK.layout.virtual_size + 512, 1 << 50, 1 << 60, 1 << 80]
)
def test_another_virtual_size_than_the_file_was_made_with_is_refused(virtual_size: int):
    with pytest.raises(IntegrityError):
        StoredDisk.parse(io.BytesIO(DISK.file), DISK.layout.size, virtual_size=virtual_size, tables_digest=None)


def test_a_huge_disk_in_a_small_file_takes_no_memory():
    # The most that a manifest may claim: the size of the file alone bounds what is read.
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError):
            StoredDisk.parse(io.BytesIO(DISK.file), DISK.layout.size, virtual_size=1 << 51, tables_digest=None)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "options", ["compat=1.1", "compat=0.10", "cluster_size=4k", "extended_l2=on", "lazy_refcounts=on"]
)
def test_what_qemu_made_is_refused(options: str, tmp_path: Path):
    path = tmp_path / "qemu.qcow2"
    run("qemu-img", "create", "-f", "qcow2", "-o", options, path, "1M")
    run("qemu-io", "-c", "write -P 7 0 300k", path)
    with path.open("r+b") as file:
        length = -(-file.seek(0, 2) // CLUSTER) * CLUSTER
        file.truncate(length)
        file.seek(0)
        with pytest.raises(IntegrityError):
            StoredDisk.parse(file, length, virtual_size=1 << 20, tables_digest=None)


def test_any_bytes_at_all_are_refused():
    source = random.Random(5)
    for _ in range(50):
        with pytest.raises(IntegrityError):
            parse(source.randbytes(10 * CLUSTER), DISK, digest=False)
