"""Reading a disk ahead of whoever reads it forwards."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from backupcore.disk.ahead import AHEAD, ReadAhead
from backupcore.disk.qcow2 import MemoryBlocks
from backupcore.errors import ContractViolation, TargetUnavailable
from tests.disk.odd_blocks import MIB, Counting, Failing, content, disk

SIZE = 40 * MIB


class Watched(MemoryBlocks):
    """Notes how many reads are under way at once, and can be interrupted as by a signal."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.under_way = self.most = 0
        self.interrupts = 0
        self.receivers: set[threading.Thread] = set()
        self.given: list[object] = []  # whose memory was to be filled

    def connect(self) -> Watched:
        return self

    def submit(self, offset, buffer):
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        self.given.append(buffer.obj)
        return super().submit(offset, buffer)

    def read_into(self, offset, buffer):
        self.receivers.add(threading.current_thread())
        if self.interrupts:
            self.interrupts -= 1
            raise KeyboardInterrupt
        self.under_way -= 1
        super().read_into(offset, buffer)


@pytest.mark.parametrize("eager", [False, True])
def test_a_sequential_reader_has_several_blocks_under_way(eager):
    blocks = Watched(content(SIZE))
    plain = disk("d", SIZE, blocks=blocks)
    with ReadAhead(plain, eager=eager).open() as stream:
        while stream.read(300_000):
            pass
    assert 1 < blocks.most <= 2 * AHEAD + 1
    plain.close()


def test_who_reads_receives_in_his_own_thread():
    blocks = Watched(content(SIZE))
    plain = disk("d", SIZE, blocks=blocks)
    with plain.open() as stream:
        assert len(stream.read()) == plain.size
    assert blocks.receivers == {threading.current_thread()}
    plain.close()


def test_a_step_of_1_mib_of_the_file_needs_one_block():
    blocks = Counting(content(SIZE))
    ahead = ReadAhead(disk("d", SIZE, blocks=blocks))
    assert ahead.read_at(5 * MIB, MIB) == disk("d", SIZE).read_at(5 * MIB, MIB)
    assert sum(length for _, length in blocks.asked) == MIB
    ahead.close()


def test_readers_that_go_elsewhere_leave_little_under_way():
    blocks = Watched(content(SIZE))
    ahead = ReadAhead(disk("d", SIZE, blocks=blocks))
    whole = disk("d", SIZE).read_at(0, SIZE)
    for number in (0, 30, 7, 21, 13, 36, 3):  # two reads make it a sequential reader
        at = number * MIB
        assert ahead.read_at(at, MIB) + ahead.read_at(at + MIB, MIB) == whole[at : at + 2 * MIB]
    assert blocks.under_way <= 3 * AHEAD
    ahead.close()


@pytest.mark.parametrize("eager", [False, True])
def test_readers_of_the_same_bytes_share_each_block(eager):
    blocks = Watched(content(SIZE))
    ahead = ReadAhead(disk("d", SIZE, blocks=blocks), eager=eager)
    whole = disk("d", SIZE).read_at(0, ahead.size)
    places = range(0, ahead.size, 200_000)
    with ThreadPoolExecutor(4) as pool:
        copies = list(pool.map(lambda _: b"".join(ahead.read_at(at, 200_000) for at in places), range(4)))
    assert all(copy == whole for copy in copies)
    ahead.close()


def test_a_read_that_a_signal_ends_is_taken_up_by_the_next():
    blocks = Watched(content(SIZE))
    ahead = ReadAhead(disk("d", SIZE, blocks=blocks))
    blocks.interrupts = 1
    with pytest.raises(KeyboardInterrupt):
        ahead.read_at(5 * MIB, 100)
    assert ahead.read_at(5 * MIB, 100) == disk("d", SIZE).read_at(5 * MIB, 100)
    ahead.close()


@pytest.mark.parametrize("eager", [False, True])
def test_an_error_ahead_is_that_of_who_comes_there(eager):
    plain = disk("d", SIZE, blocks=Failing(content(SIZE), 3 * MIB))
    ahead = ReadAhead(plain, eager=eager)
    stream = ahead.open()
    assert len(stream.read(2 * MIB)) == 2 * MIB
    with pytest.raises(TargetUnavailable, match="past"):
        stream.read()
    ahead.close()


@pytest.mark.parametrize("size", [SIZE, SIZE - 5 * MIB - 70_001])
def test_large_reads_are_received_where_the_reader_wants_them(size):
    blocks = Watched(content(size))
    ahead = ReadAhead(disk("d", size, blocks=blocks), eager=True)
    read = bytearray(ahead.size)
    for at, end in ((0, 8 * MIB), (8 * MIB, 12 * MIB), (12 * MIB, ahead.size)):
        assert ahead.read_into(at, memoryview(read)[at:end]) == end - at
    assert read == disk("d", size).read_at(0, ahead.size)
    assert all(one is read for one in blocks.given)
    assert blocks.receivers == {threading.current_thread()}
    assert 1 < blocks.most <= AHEAD + 2  # the first block is of two runs
    ahead.close()


def test_large_reads_that_cut_a_block_or_find_one_here_read_nothing_twice():
    blocks = Counting(content(SIZE))
    ahead = ReadAhead(disk("d", SIZE, blocks=blocks))
    whole = disk("d", SIZE).read_at(0, ahead.size)
    assert ahead.read_at(9 * MIB, 100) == whole[9 * MIB :][:100]
    for at, length in ((4 * MIB, 8 * MIB), (12 * MIB + 70_000, 6 * MIB), (18 * MIB + 70_000, 6 * MIB - 70_000)):
        assert ahead.read_at(at, length) == whole[at : at + length]
    assert sum(length for _, length in blocks.asked) == 20 * MIB
    ahead.close()


class Late(Counting):
    """Fails for the read at `bad`, and notes what was received of the others."""

    def __init__(self, data: bytes, bad: int) -> None:
        super().__init__(data)
        self.bad = bad
        self.submitted: list[int] = []

    def connect(self) -> Late:
        return self

    def submit(self, offset, buffer):
        self.submitted.append(offset)
        return super().submit(offset, buffer)

    def read_into(self, offset, buffer):
        super().read_into(offset, buffer)
        if offset <= self.bad < offset + len(buffer):
            raise TargetUnavailable("that part is broken")


def test_nothing_is_written_to_a_readers_memory_after_an_error():
    blocks = Late(content(SIZE), 10 * MIB)
    ahead = ReadAhead(disk("d", SIZE, blocks=blocks))
    with pytest.raises(TargetUnavailable, match="broken"):
        ahead.read_at(8 * MIB, 16 * MIB)
    assert len(blocks.submitted) < 16  # it went no further
    assert {offset for offset, _ in blocks.asked} == set(blocks.submitted)
    ahead.close()


def test_a_large_read_after_close_is_refused():
    ahead = ReadAhead(disk("d", SIZE))
    ahead.close()
    with pytest.raises(ContractViolation, match="closed"):
        ahead.read_at(8 * MIB, 16 * MIB)
