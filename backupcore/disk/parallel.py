"""Several reads at once, their results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from backupcore.disk.direct import memory

__all__ = ["LARGE", "REQUESTS", "each", "in_parallel"]

REQUESTS = 4
"""Small reads that are under way at once where a store can seek."""

LARGE = 3
"""Reads of whole spans (`backupcore.disk.spans`) at once. Each has its memory, and so have two that wait."""

_LOOK = 0.1  # seconds between two looks at whether the work is to stop
J = TypeVar("J")
T = TypeVar("T")


def each(work: Callable[[J], T], jobs: Iterable[J], requests: int = REQUESTS) -> Generator[T, None, None]:
    """What `work` makes of each job, in their order; so many at once, in threads of their own if it is more than one.

    The first error is raised where its result would come. For small work that waits for a store; when this has ended or
    is closed, so has all that was begun.
    """
    if requests == 1:
        yield from map(work, jobs)
        return
    with ThreadPoolExecutor(requests, "each") as pool:
        yield from pool.map(work, jobs)


def in_parallel(
    jobs: Iterable[J], read: Callable[[J, memoryview], T], check: Callable[[], None], *, size: int
) -> Iterator[T]:
    """What `read` makes of each job, in their order; it is called by `LARGE` threads, with a buffer of `size` bytes.

    The buffer is the job's until the next result is asked for. `check` is called at least ten times a second and may
    raise. What `read` raises is raised here.
    """
    free: list[memoryview] = []  # used again and again: fresh memory costs a page fault per 4 KiB
    waiting: deque[tuple[memoryview, Future[T]]] = deque()
    pool = ThreadPoolExecutor(LARGE, "parallel-read")
    try:
        for job in jobs:
            if len(waiting) == LARGE + 2:
                buffer, future = waiting.popleft()
                yield _settled(future, check)
                free.append(buffer)
            buffer = free.pop() if free else memory(size)
            waiting.append((buffer, pool.submit(read, job, buffer)))
        for _, future in waiting:
            yield _settled(future, check)
    finally:
        # A read that hangs is ended by what it hangs on: nobody waits for it any more.
        pool.shutdown(wait=False, cancel_futures=True)


def _settled(future: Future[T], check: Callable[[], None]) -> T:
    """Its result, unless the work is to stop before."""
    while True:
        check()
        if wait([future], _LOOK).done:
            return future.result()
