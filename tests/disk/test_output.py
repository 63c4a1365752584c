"""Writing past the page cache, and through it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from backupcore.disk.direct import ALIGNED, LEAST, memory, reopened, streams, suits
from backupcore.disk.output import Output
from lab.loop import loop_device

MIB = 1 << 20


def filled(size: int) -> memoryview:
    data = memory(size)
    data[:] = os.urandom(size)
    return data


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A block device of 16 MiB."""
    with loop_device(tmp_path / "device", bytes(16 * MIB)) as made:
        yield made


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system of 16 MiB."""
    if os.geteuid():
        pytest.skip("only root can mount a file system")
    image, there = tmp_path / "image", tmp_path / "there"
    image.write_bytes(bytes(16 * MIB))
    there.mkdir()
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, there], check=True)
    yield there
    subprocess.run(["umount", there], check=True)


@pytest.mark.parametrize("size", [0, 1, ALIGNED, LEAST, 3 * LEAST + 5])
def test_memory_begins_with_a_page(size: int) -> None:
    data = memory(size)
    assert (len(data), data.readonly, bytes(data)) == (size, False, bytes(size))
    assert suits(0, data) == (size == LEAST)


def test_what_can_go_past_the_cache() -> None:
    data = memory(4 * MIB)
    assert suits(0, data)
    assert suits(7 * ALIGNED, data[ALIGNED : ALIGNED + LEAST])
    assert not suits(0, data[: LEAST - ALIGNED]), "it is small"
    assert not suits(512, data)
    assert not suits(0, data[: LEAST + 512])
    assert not suits(0, data[512 : LEAST + 512]), "it does not begin with a page"
    assert not suits(0, data.toreadonly())
    assert not suits(0, memoryview(bytes(4 * MIB)))


@pytest.mark.parametrize(
    ("stripe", "rotational", "write_cache", "expected"),
    [
        (0, 0, "write through", True),  # an SSD whose cache needs no flush
        (0, 1, "write back", True),  # a plain disk; what most disks of virtual machines say
        (0, 1, "write through", False),  # a SAS disk as it is sold
        (128 << 10, 0, "write through", True),  # an NVMe disk that likes requests of 128 KiB
        (1 << 20, 1, "write back", False),  # RAID 5 of three disks
        (3 << 20, 1, "write back", False),  # RAID 6 of eight disks
        (768 << 10, 0, "write back", False),
    ],
)
def test_which_disks_take_one_request_after_the_other(
    tmp_path: Path, stripe: int, rotational: int, write_cache: str, expected: bool
) -> None:
    (tmp_path / "optimal_io_size").write_text(f"{stripe}\n")
    (tmp_path / "rotational").write_text(f"{rotational}\n")
    (tmp_path / "write_cache").write_text(f"{write_cache}\n")
    assert streams(tmp_path) == expected


def test_a_file_is_opened_past_the_cache_with_the_same_rights(small: Path) -> None:
    for mode, flag in ("xb", os.O_WRONLY), ("rb", os.O_RDONLY), ("r+b", os.O_RDWR):
        with (small / "file").open(mode) as opened:
            direct = reopened(opened.fileno())
            assert direct is not None
            flags = fcntl.fcntl(direct, fcntl.F_GETFL)
            os.close(direct)
        assert flags & os.O_DIRECT
        assert flags & os.O_ACCMODE == flag


def test_what_is_not_on_a_disk_is_not(tmp_path: Path) -> None:
    with tempfile.TemporaryFile(dir="/dev/shm") as opened:
        assert reopened(opened.fileno()) is None
    reading, writing = os.pipe()
    try:
        assert reopened(writing) is None
    finally:
        os.close(reading)
        os.close(writing)
    assert reopened(writing) is None, "it is closed"


def test_a_read_only_descriptor_stays_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"kept")
    with (
        file.open("rb") as opened,
        closing(Output(opened.fileno())) as output,
        pytest.raises(OSError, match="Bad file descriptor"),
    ):
        output.write(0, filled(LEAST))
    assert file.read_bytes() == b"kept"


def test_the_file_is_what_was_written_whatever_the_pieces(tmp_path: Path) -> None:
    content = filled(24 * MIB + 700)
    ends = [0, 4 * MIB, 4 * MIB + 100, 6 * MIB + 100, 7 * MIB, 7 * MIB + 512, 8 * MIB, 8 * MIB + (64 << 10), 23 * MIB]
    pieces = list(zip(ends, [*ends[1:], len(content)], strict=True))
    with (tmp_path / "file").open("w+b", 0) as file, closing(Output(file.fileno())) as output:
        for start, end in reversed(pieces):
            output.write(start, content[start:end])
        assert os.pread(file.fileno(), len(content), 0) == content
        output.write(2 * MIB, content[:MIB])
        assert (
            os.pread(file.fileno(), len(content), 0) == bytes(content[: 2 * MIB]) + content[:MIB] + content[3 * MIB :]
        )
        os.fsync(file.fileno())


def test_a_device_is_written_to_past_the_cache(device: Path) -> None:
    content = filled(16 * MIB)
    with device.open("r+b", 0) as file, closing(Output(file.fileno())) as output:
        for start in range(0, len(content), 4 * MIB):
            output.write(start, content[start : start + 4 * MIB])
        os.fsync(file.fileno())
    assert device.read_bytes() == content


def test_a_disk_that_wants_more_than_we_know_is_written_to_through_the_cache(device: Path) -> None:
    content, asked = filled(16 * MIB), []

    def all_that_is_large(offset: int, data: memoryview) -> bool:
        asked.append(offset)
        return len(data) >= MIB

    with device.open("r+b", 0) as file, closing(Output(file.fileno(), all_that_is_large)) as output:
        output.write(0, content[: 4 * MIB + 100])
        output.write(4 * MIB + 100, content[4 * MIB + 100 :])
        os.fsync(file.fileno())
    assert device.read_bytes() == content
    assert asked == [0], "it was refused once, and not tried again"


def test_a_full_disk_says_so(small: Path) -> None:
    with (
        (small / "file").open("xb", 0) as file,
        closing(Output(file.fileno())) as output,
        pytest.raises(OSError, match="No space left on device"),
    ):
        output.write(0, filled(32 * MIB))
