"""The writer of restored disks: what it leaves behind is a disk to QEMU, and before it is finished it is none."""

from __future__ import annotations

import json
import mmap
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backupcore.disk.extents import CLUSTER, Kind
from backupcore.disk.writer import _KEPT, DiskWriter
from backupcore.errors import AccessDenied, TargetFull, TargetUnavailable, UnsupportedOperation
from tests.disk.layers import SPAN, Made, Model, extents, make, sizes
from tests.disk.qemu_nbd import run

slow = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
soak = settings(slow, max_examples=2000)

layers = sizes.flatmap(lambda size: st.builds(make, st.just(size), extents(size), seed=st.integers(0, 1 << 20)))


def write_and_compare(made: Made, order: random.Random, folder: Path) -> None:
    path, raw = folder / "disk.qcow2", folder / "truth.raw"
    path.unlink(missing_ok=True)
    model = Model()
    model.apply(made)
    model.write_raw(raw)
    pieces = []
    for extent in made.layout.extents():
        end = min(extent.end, made.layout.virtual_size)
        cuts = sorted({extent.offset, *(order.randrange(extent.offset, end) // CLUSTER * CLUSTER for _ in "ab"), end})
        pieces += [(low, high, extent.kind) for low, high in zip(cuts, cuts[1:], strict=False)]
    order.shuffle(pieces)
    with DiskWriter(path, made.layout.virtual_size) as writer:
        for low, high, kind in pieces:
            if kind is Kind.ZERO:
                writer.zero(low, high - low)
            else:
                data = b"".join(made.data[at] for at in range(low, high, CLUSTER))
                writer.write(low, memoryview(data))
        assert path.stat().st_size < CLUSTER or not any(path.read_bytes()[:CLUSTER])
        writer.finish()
        writer.finish()
    checked = json.loads(run("qemu-img", "check", "--output", "json", path))
    assert not {key for key in ("leaks", "corruptions", "check-errors") if checked.get(key)}
    assert checked["image-end-offset"] == path.stat().st_size
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, raw)
    told = json.loads(run("qemu-img", "info", "--output", "json", path))
    assert told["virtual-size"] == -(-made.layout.virtual_size // 512) * 512
    assert told["format-specific"]["data"]["compat"] == "1.1"
    assert "backing-filename" not in told


@slow
@given(made=layers, order=st.randoms(use_true_random=False))
def test_qemu_reads_what_was_written_in_any_order(made: Made, order: random.Random, tmp_path: Path):
    write_and_compare(made, order, tmp_path)


@pytest.mark.soak
@soak
@given(made=layers, order=st.randoms(use_true_random=False))
def test_qemu_reads_what_was_written_many_times(made: Made, order: random.Random, tmp_path: Path):
    write_and_compare(made, order, tmp_path)


def test_an_unfinished_file_is_no_disk(tmp_path: Path):
    path = tmp_path / "disk.qcow2"
    with DiskWriter(path, SPAN) as writer:
        writer.write(0, memoryview(b"x" * CLUSTER))
    assert path.stat().st_mode & 0o777 == 0o600
    done = subprocess.run(["qemu-img", "info", "-f", "qcow2", path], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "not in qcow2 format" in done.stderr


def test_an_existing_file_is_left_alone(tmp_path: Path):
    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"precious")
    with pytest.raises(TargetUnavailable, match=r"creating .*disk\.qcow2: File exists"):
        DiskWriter(path, SPAN)
    assert path.read_bytes() == b"precious"
    with path.open("r+b") as file, pytest.raises(ValueError, match="8 bytes already"):
        DiskWriter(file.fileno(), SPAN)


def test_a_descriptor_stays_the_callers(tmp_path: Path):
    path = tmp_path / "disk.qcow2"
    with path.open("x+b") as file:
        with DiskWriter(file.fileno(), 700) as writer:
            writer.write(0, memoryview(b"y" * 700))
            writer.finish()
        assert os.fstat(file.fileno()).st_size
    run("qemu-img", "check", path)
    assert run("qemu-io", "-r", "-c", "read -P 0x79 0 700", "-c", "read -P 0 700 324", path).count("read ") == 2


def test_a_full_target_is_named():
    with Path("/dev/full").open("r+b", buffering=0) as full:
        writer = DiskWriter(full.fileno(), SPAN)
        with pytest.raises(TargetFull, match="No space left"):
            writer.write(0, memoryview(b"x" * CLUSTER))
        with pytest.raises(TargetFull, match="No space left"):
            writer.finish()


def test_a_folder_that_is_missing_or_closed(tmp_path: Path):
    with pytest.raises(TargetUnavailable, match="No such file"):
        DiskWriter(tmp_path / "gone" / "disk.qcow2", SPAN)
    with Path("/dev/zero").open("rb") as read_only:
        writer = DiskWriter(read_only.fileno(), SPAN)
        with pytest.raises((AccessDenied, TargetUnavailable)):
            writer.write(0, memoryview(b"x" * CLUSTER))


@pytest.mark.parametrize(
    ("offset", "length"), [(1, CLUSTER), (0, 1), (-CLUSTER, CLUSTER), (0, 0), (CLUSTER, CLUSTER), (2 * CLUSTER, 1)]
)
def test_ranges_that_are_no_clusters_are_refused(offset: int, length: int, tmp_path: Path):
    with DiskWriter(tmp_path / "disk.qcow2", CLUSTER + 700) as writer:
        for call in (lambda: writer.write(offset, memoryview(bytes(length))), lambda: writer.zero(offset, length)):
            with pytest.raises(ValueError, match="whole clusters"):
                call()


def test_a_cluster_is_written_once(tmp_path: Path):
    with DiskWriter(tmp_path / "disk.qcow2", SPAN) as writer:
        writer.write(CLUSTER, memoryview(bytes(CLUSTER)))
        with pytest.raises(ValueError, match="already"):
            writer.write(0, memoryview(bytes(3 * CLUSTER)))


def test_more_tables_than_are_kept_in_memory(tmp_path: Path):
    """Each of the tables is left and come back to, and what it held is still in it."""
    path, tables = tmp_path / "disk.qcow2", _KEPT + 40
    with DiskWriter(path, tables * SPAN) as writer:
        for turn in range(3):
            for index in range(tables):
                writer.write(index * SPAN + turn * CLUSTER, memoryview(bytes([1 + turn + index]) * CLUSTER))
        with pytest.raises(ValueError, match="already"):
            writer.write(CLUSTER, memoryview(bytes(CLUSTER)))
        writer.finish()
    run("qemu-img", "check", path)
    held = [one for one in json.loads(run("qemu-img", "map", "--output", "json", path)) if one["data"]]
    assert sum(one["length"] for one in held) == 3 * tables * CLUSTER, "and nothing else"
    places = [(index * SPAN + turn * CLUSTER, 1 + turn + index) for index in range(tables) for turn in range(3)]
    reads = [f"read -P {pattern} {offset} {CLUSTER}" for offset, pattern in places]
    told = run("qemu-io", "-r", *(word for read in reads for word in ("-c", read)), path)
    assert "failed" not in told
    assert told.count("read ") == len(reads)


def test_a_disk_too_large_for_qcow2_makes_no_file(tmp_path: Path):
    with pytest.raises(UnsupportedOperation):
        DiskWriter(tmp_path / "disk.qcow2", 3 << 50)
    assert list(tmp_path.iterdir()) == []


_LARGE = """
import random, sys
from pathlib import Path
from backupcore.disk.extents import CLUSTER
from backupcore.disk.writer import DiskWriter

data = memoryview(b"island!!" * (CLUSTER // 8))
with DiskWriter(Path(sys.argv[1]), 1 << 40) as writer:
    for place in random.sample(range((1 << 40) // CLUSTER), 2000):
        writer.write(place * CLUSTER, data)
    writer.finish()
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_a_disk_of_1_tib_is_written_in_little_memory(tmp_path: Path):
    path = tmp_path / "disk.qcow2"
    done = subprocess.run([sys.executable, "-c", _LARGE, path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) // 1024 < 100
    run("qemu-img", "check", path)


@pytest.mark.soak
def test_a_file_with_several_refcount_blocks(tmp_path: Path):
    path = tmp_path / "disk.qcow2"
    zeros = memoryview(mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    with DiskWriter(path, 6 << 30) as writer:
        for place in (4, 0, 2, 5, 1):
            writer.write(place << 30, zeros)
        writer.finish()
    run("qemu-img", "check", path)
    path.unlink()
