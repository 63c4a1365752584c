"""The layout against QEMU's own tools, and the artifact that shows it."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from backupcore.disk import nbd
from backupcore.disk.extents import CLUSTER, Extent, Kind
from backupcore.disk.qcow2 import DiskArtifact, Layout, MemoryBlocks
from backupcore.errors import HypervisorError, UnsupportedOperation
from tests.disk.layers import ODD_SIZES, SPAN, Made, Model, SparseBlocks, clusters, extents, make, sizes
from tests.disk.qemu_nbd import QemuNbd, run

LIMIT = 20.0
slow = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
quick = settings(slow, max_examples=60)
soak = settings(slow, max_examples=2000)

disks = sizes.flatmap(lambda size: st.tuples(st.just(size), extents(size)))


def mapped(layer: Made) -> list[tuple[int, int, bool, bool, int | None]]:
    """(start, length, present, data, file offset), as `qemu-img map` should tell it."""
    end = -(-layer.layout.virtual_size // 512) * 512
    found: list[tuple[int, int, bool, bool, int | None]] = []
    position = 0
    file = layer.layout.data_offset
    for offset, length, kind in [*layer.layout.extents(), Extent(end, 0, Kind.ZERO)]:
        if offset > position:
            found.append((position, offset - position, False, False, None))
        position = offset + length
        shown = min(position, end) - offset
        if not shown:
            continue
        if kind is Kind.DATA:
            found.append((offset, shown, True, True, file))
            file += length
        else:
            found.append((offset, shown, True, False, None))
    return found


def check_with_qemu(layer: Made, folder: Path) -> None:
    path, raw = folder / "layer.qcow2", folder / "truth.raw"
    path.write_bytes(layer.file)
    model = Model()
    model.apply(layer)
    model.write_raw(raw)
    checked = json.loads(run("qemu-img", "check", "--output", "json", path))
    assert {key for key in checked if key in {"leaks", "corruptions", "check-errors"} and checked[key]} == set()
    assert checked["image-end-offset"] == layer.layout.size
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, raw)
    lines = json.loads(run("qemu-img", "map", "--output", "json", path))
    told = [(line["start"], line["length"], line["present"], line["data"], line.get("offset")) for line in lines]
    assert told == mapped(layer)


@slow
@given(disk=disks)
@example(disk=(SPAN, [Extent(0, SPAN, Kind.ZERO)]))
@example(disk=(3 * SPAN, [Extent(SPAN - CLUSTER, SPAN + 2 * CLUSTER, Kind.ZERO)]))
@example(disk=(3 * SPAN, [Extent(0, SPAN, Kind.ZERO), Extent(2 * SPAN, CLUSTER, Kind.DATA)]))
def test_qemu_finds_nothing_wrong_and_the_same_contents(disk: tuple[int, list[Extent]], tmp_path: Path):
    check_with_qemu(make(*disk), tmp_path)


@pytest.mark.soak
@soak
@given(disk=disks, seed=st.integers(0, 1 << 20))
def test_qemu_finds_nothing_wrong_in_many_layouts(disk: tuple[int, list[Extent]], seed: int, tmp_path: Path):
    check_with_qemu(make(*disk, seed=seed), tmp_path)


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("kind", [Kind.DATA, Kind.ZERO, None])
def test_odd_sizes(size: int, kind: Kind | None, tmp_path: Path):
    found = [Extent(0, clusters(size) * CLUSTER, kind)] if kind else []
    layer = make(size, found)
    check_with_qemu(layer, tmp_path)
    told = json.loads(run("qemu-img", "info", "--output", "json", tmp_path / "layer.qcow2"))
    assert told["virtual-size"] == -(-size // 512) * 512
    assert told["cluster-size"] == CLUSTER
    assert "backing-filename" not in told
    details = told["format-specific"]["data"]
    assert (details["compat"], details["lazy-refcounts"], details["refcount-bits"]) == ("1.1", False, 16)


@pytest.mark.parametrize("data_clusters", [32761, 32762, 32763, 32764, 32765, 65529, 65530, 65531])
def test_refcounts_where_one_more_block_is_needed(data_clusters: int, tmp_path: Path):
    # Around 2 GiB of file, where counting the refcount blocks themselves decides whether one more is needed.
    layout = Layout(8 << 30, [Extent(0, data_clusters * CLUSTER, Kind.DATA)])
    path = tmp_path / "large.qcow2"
    path.write_bytes(layout.tables(0, layout.data_offset))
    with path.open("r+b") as file:
        file.truncate(layout.size)
    run("qemu-img", "check", path)


@quick
@given(disk=disks, data=st.data())
def test_every_range_reads_the_same(disk: tuple[int, list[Extent]], data: st.DataObject):
    made = make(*disk)
    artifact = pickle.loads(pickle.dumps(DiskArtifact("d", made.layout, SparseBlocks(made.data))))
    edge = st.sampled_from([0, made.layout.data_offset, made.layout.size])
    near = st.builds(lambda base, away: max(0, base + away), edge, st.integers(-CLUSTER - 9, CLUSTER + 9))
    offset = data.draw(st.one_of(near, st.integers(0, made.layout.size + 5)))
    length = data.draw(st.one_of(near, st.integers(0, 3 * CLUSTER)))
    assert artifact.read_at(offset, length) == made.file[offset : offset + length]
    assert made.layout.size == len(made.file) == artifact.size
    assert made.layout.tables_digest() == blake3(made.file[: made.layout.data_offset]).digest()


@quick
@given(disk=disks, data=st.data())
def test_runs_and_index_agree_with_counting(disk: tuple[int, list[Extent]], data: st.DataObject):
    size, found = disk
    layout = Layout(size, found)
    offsets = [at for e in found if e.kind is Kind.DATA for at in range(e.offset, e.end, CLUSTER)]
    assert layout.clusters == len(offsets)
    first = data.draw(st.integers(0, len(offsets)))
    count = data.draw(st.integers(0, len(offsets) - first))
    runs = list(layout.runs(first, count))
    assert [at for offset, length in runs for at in range(offset, offset + length, CLUSTER)] == offsets[
        first : first + count
    ]
    assert all(one[0] + one[1] < two[0] for one, two in pairwise(runs))
    assert all(offset + length <= size for offset, length in runs)
    inside = [at for e in found for at in range(e.offset, e.end, CLUSTER)][:20]
    for offset in (data.draw(st.integers(0, clusters(size))) * CLUSTER, *inside):
        assert layout.index(offset) == sum(at < offset for at in offsets)
    with pytest.raises(ValueError, match="clusters"):
        list(layout.runs(first, len(offsets) - first + 1))


@pytest.mark.parametrize(
    "found",
    [
        [Extent(1, CLUSTER, Kind.DATA)],
        [Extent(0, CLUSTER - 1, Kind.DATA)],
        [Extent(0, 3 * CLUSTER, Kind.DATA)],
        [Extent(CLUSTER, CLUSTER, Kind.DATA), Extent(0, CLUSTER, Kind.DATA)],
        [Extent(0, CLUSTER, Kind.DATA), Extent(0, CLUSTER, Kind.ZERO)],
    ],
)
def test_extents_that_are_no_clusters_of_the_disk_are_refused(found: list[Extent]):
    with pytest.raises(ValueError, match=r"whole clusters|after|overlap"):
        Layout(CLUSTER + 512, found)


def test_sizes_that_cannot_be_are_refused():
    for size in (0, -1):
        with pytest.raises(ValueError, match="no layout"):
            Layout(size, [])
    with pytest.raises(UnsupportedOperation, match="a disk of"):
        Layout((2 << 50) + 1, [])
    with pytest.raises(UnsupportedOperation, match="a backup of"):
        Layout(2 << 50, [Extent(0, 2 << 50, Kind.DATA)])
    assert Layout(2 << 50, []).clusters == 0


def test_what_lies_past_the_end_of_the_disk_is_zeros_whatever_the_buffer_held():
    artifact = DiskArtifact("d", Layout(700, [Extent(0, CLUSTER, Kind.DATA)]), MemoryBlocks(b"x" * 700))
    buffer = bytearray(b"old " * (CLUSTER // 4))
    artifact.read_clusters(0, 1, memoryview(buffer))
    assert buffer == b"x" * 700 + bytes(CLUSTER - 700)
    with pytest.raises(ValueError, match="a buffer of 65536 bytes for 2 clusters"):
        artifact.read_clusters(0, 2, memoryview(buffer))


# One connection, closed for ever


class Door(MemoryBlocks):
    """A disk whose connect waits until it is let in, and which counts."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.asked, self.let_in = threading.Event(), threading.Event()
        self.connections = 0
        self.closed = 0

    def connect(self) -> Door:
        self.asked.set()
        assert self.let_in.wait(LIMIT)
        self.connections += 1
        return self

    def close(self) -> None:
        self.closed += 1


def test_threads_share_one_connection():
    door = Door(bytes(8 * CLUSTER))
    door.let_in.set()
    artifact = DiskArtifact("d", Layout(8 * CLUSTER, [Extent(0, 8 * CLUSTER, Kind.DATA)]), door)
    assert artifact.read_at(0, CLUSTER)
    assert door.connections == 0  # tables need none
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda at: artifact.read_at(artifact.size - at * CLUSTER, CLUSTER), range(1, 9)))) == 1
    assert door.connections == 1
    artifact.close()
    artifact.close()
    assert door.closed == 1


def test_close_waits_for_a_connection_being_made_and_lets_no_other_follow():
    door = Door(bytes(CLUSTER))
    artifact = DiskArtifact("disk.vda.qcow2", Layout(CLUSTER, [Extent(0, CLUSTER, Kind.DATA)]), door)
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(artifact.read_at, artifact.size - 1, 1)
        assert door.asked.wait(LIMIT)
        closing = pool.submit(artifact.close)
        with pytest.raises(TimeoutError):
            closing.result(0.1)
        door.let_in.set()
        closing.result(LIMIT)
        assert (door.connections, door.closed) == (1, 1)
        reading.exception(LIMIT)
    with pytest.raises(HypervisorError, match=r"disk\.vda\.qcow2 was read after"):
        artifact.read_at(artifact.size - 1, 1)
    assert door.connections == 1


def test_what_was_closed_stays_closed_when_pickled():
    artifact = DiskArtifact("d", Layout(CLUSTER, [Extent(0, CLUSTER, Kind.DATA)]), MemoryBlocks(bytes(CLUSTER)))
    assert pickle.loads(pickle.dumps(artifact)).read_at(artifact.size - 1, 1) == b"\0"
    artifact.close()
    with pytest.raises(HypervisorError):
        pickle.loads(pickle.dumps(artifact)).read_at(artifact.size - 1, 1)


@pytest.fixture(params=[700, 3 * CLUSTER + 513])
def raw(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(range(1, 256)) * (request.param // 255) + b"x" * (request.param % 255))
    return path


def test_a_raw_disk_of_odd_size_read_through_nbd(raw: Path, tmp_path: Path):
    with QemuNbd(raw, "raw") as server:
        with nbd.Client(server.address) as client:
            size = client.size
        artifact = DiskArtifact("d", Layout(size, [Extent(0, clusters(size) * CLUSTER, Kind.DATA)]), server.address)
        copy = tmp_path / "copy.qcow2"
        with artifact.open() as stream:
            copy.write_bytes(stream.read())
        artifact.close()
    run("qemu-img", "check", copy)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", copy, raw)


# Large disks

_LARGE = """
import random, sys, io
from backupcore.disk.extents import CLUSTER, Extent, Kind
from backupcore.disk.qcow2 import Layout
from backupcore.disk.stored import StoredDisk

TIB = 1 << 40
half = TIB // CLUSTER // 2
found = {
    "islands": lambda: (
        Extent(2 * at * CLUSTER, CLUSTER, Kind.DATA) for at in sorted(random.sample(range(half), 30000))
    ),
    "full": lambda: [Extent(0, TIB, Kind.DATA)],
    "alternating": lambda: (Extent(2 * at * CLUSTER, CLUSTER, Kind.DATA) for at in range(half)),
}[sys.argv[1]]

class Tables(io.RawIOBase):
    def __init__(self, layout):
        self.layout, self.at = layout, 0
    def read(self, length):
        self.at += length
        return self.layout.tables(self.at - length, length)

layout = Layout(TIB, found())
digest = layout.tables_digest()
assert sum(length for _, length in layout.runs(layout.clusters // 2, 1000 * (layout.clusters > 2000))) >= 0
count = layout.clusters
again = StoredDisk.parse(Tables(layout), layout.size, virtual_size=TIB, tables_digest=digest)
assert again.clusters == count
# Not ru_maxrss: that of a child begins with the peak of the process that started it.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize("pattern", ["islands", "full", pytest.param("alternating", marks=pytest.mark.soak)])
def test_a_disk_of_1_tib_is_laid_out_and_read_back_in_little_memory(pattern: str):
    limit = 1200 if pattern == "alternating" else 120  # seconds
    command = [sys.executable, "-c", _LARGE, pattern]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) // 1024 < (900 if pattern == "alternating" else 400)
