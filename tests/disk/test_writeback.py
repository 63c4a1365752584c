"""Sending a file to the disk while it is written."""

from __future__ import annotations

import os
from pathlib import Path

from backupcore.disk.writeback import RANGE, Writeback

MIB = 1 << 20


def ranges(*writes: tuple[int, int]) -> list[tuple[int, int]]:
    sent: list[tuple[int, int]] = []
    writeback = Writeback(7, lambda fd, offset, length: sent.append((offset, length)) if fd == 7 else None)
    for offset, length in writes:
        writeback.wrote(offset, length)
    return sent


def test_every_byte_written_forwards_is_sent_once_and_in_order() -> None:
    sent = ranges(*((offset, MIB) for offset in range(0, 5 * RANGE, MIB)))
    assert sent == [(offset, RANGE) for offset in range(0, 5 * RANGE, RANGE)]


def test_a_large_write_is_sent_as_it_is() -> None:
    assert ranges((0, 3 * RANGE + 5)) == [(0, 3 * RANGE + 5)]


def test_small_gaps_are_sent_along_so_that_islands_are_not_sent_one_by_one() -> None:
    sent = ranges(*((offset, 64 << 10) for offset in range(0, 2 * RANGE, MIB)))
    assert len(sent) == 1
    assert sent[0][0] == 0
    assert sent[0][1] >= RANGE


def test_what_jumps_about_is_left_to_the_kernel() -> None:
    far = 10 * RANGE
    assert ranges((far, MIB), (0, MIB), (far, MIB), (2 * RANGE, MIB)) == []
    assert ranges((far, MIB), (0, RANGE)) == [(0, RANGE)], "and begins anew after a jump"


def test_the_file_is_what_was_written(tmp_path: Path) -> None:
    content = os.urandom(2 * RANGE + 100)
    with (tmp_path / "file").open("wb", 0) as file:
        writeback = Writeback(file.fileno())
        for offset in range(0, len(content), MIB):
            file.write(content[offset : offset + MIB])
            writeback.wrote(offset, min(MIB, len(content) - offset))
    assert (tmp_path / "file").read_bytes() == content
