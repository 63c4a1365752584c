"""Reads in parallel: results in order, memory that is used again, and an end to what goes wrong."""

from __future__ import annotations

import threading

import pytest

from backupcore.disk.parallel import LARGE, REQUESTS, each, in_parallel
from backupcore.errors import Cancelled, IntegrityError


def nothing() -> None:
    pass


def test_results_come_in_order_from_few_buffers():
    buffers = set()

    def read(job: int, buffer: memoryview) -> tuple[int, memoryview]:
        buffers.add(id(buffer.obj))
        buffer[:4] = job.to_bytes(4, "big")
        return job, buffer

    for expected, (job, buffer) in enumerate(in_parallel(iter(range(500)), read, nothing, size=4)):
        assert job == expected
        assert int.from_bytes(buffer, "big") == job, "the next read has not overwritten it yet"
    assert job == 499
    assert len(buffers) <= LARGE + 3


def test_several_reads_are_under_way_at_once():
    meeting = threading.Barrier(LARGE, timeout=30)
    assert list(in_parallel(range(LARGE), lambda job, _: (meeting.wait(), job)[1], nothing, size=1)) == [*range(LARGE)]


def test_what_a_read_raises_is_raised():
    def read(job: int, _buffer: memoryview) -> int:
        if job == 3:
            raise IntegrityError("damaged")
        return job

    with pytest.raises(IntegrityError, match="damaged"):
        list(in_parallel(range(100), read, nothing, size=1))


def test_a_read_that_hangs_does_not_keep_the_work_from_being_stopped():
    gate = threading.Event()
    asked = 0

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked > 2:
            raise Cancelled("cancelled")

    try:
        with pytest.raises(Cancelled):
            list(in_parallel([0], lambda job, _: gate.wait(60), check, size=1))
    finally:
        gate.set()


@pytest.mark.parametrize("requests", [1, REQUESTS])
def test_each_gives_results_in_order_and_the_first_error_in_its_place(requests: int):
    def work(job: int) -> int:
        if job in (4, 6):
            raise IntegrityError(f"job {job}")
        return job

    given = each(work, range(9), requests)
    assert [next(given) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(IntegrityError, match="job 4"):
        next(given)


def test_each_has_several_under_way_and_none_once_it_is_closed():
    meeting = threading.Barrier(REQUESTS, timeout=30)
    begun, ended = [], []

    def work(job: int) -> int:
        begun.append(job)
        if job < REQUESTS:
            meeting.wait()
        ended.append(job)
        return job

    given = each(work, range(4 * REQUESTS))
    assert next(given) == 0
    given.close()
    assert sorted(begun) == sorted(ended)
