"""Several requests at once: threads that end with their work, at the first error, or when the run is cancelled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

__all__ = ["Crew", "answered"]

T = TypeVar("T")

PATIENCE = 5.0
"""Seconds that a request under way has to end after an error or a cancel. One that hangs longer is left behind: its
thread can publish nothing, and ends with its request or with this process."""

_LOOK = 0.1  # seconds between two looks at whether the run is cancelled


class Crew:
    """`workers` threads at most; `check` raises when the work is to stop. A crew may work several times.

    `failed` is called as soon as the work cannot succeed any more, before requests that hang are waited for.
    """

    def __init__(
        self,
        workers: int,
        check: Callable[[], None],
        failed: Callable[[], None] = lambda: None,
        *,
        patience: float = PATIENCE,
    ) -> None:
        self._workers = workers
        self._check = check
        self._failed = failed
        self._patience = patience
        self._changed = threading.Condition()  # guards all below
        self._running = 0
        self._error: BaseException | None = None

    @property
    def idle(self) -> bool:
        """True unless a thread was left behind."""
        with self._changed:
            return not self._running

    def work(self, jobs: Iterable[Callable[[], None]], workers: int | None = None) -> None:
        """Do every job, some at once; raise the first error of any. The next job begins as soon as one ends."""
        left = iter(jobs)
        with self._changed:
            for number in range(min(workers or self._workers, self._workers)):
                self._running += 1
                threading.Thread(target=self._follow, args=(left,), name=f"s3-{number}", daemon=True).start()
        try:
            self._wait()
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._leave()
        if self._error is not None:
            raise self._error

    def answer(self, job: Callable[[], T]) -> T:
        """Do one job, and return what it gives."""
        answers: list[T] = []
        self.work([lambda: answers.append(job())], 1)
        return answers[0]

    def _wait(self) -> None:
        while True:
            self._check()
            with self._changed:
                if not self._running or self._error is not None:
                    return
                self._changed.wait(_LOOK)

    def _leave(self) -> None:
        if self._error is not None:
            self._failed()
        end = time.monotonic() + self._patience
        with self._changed:
            while self._running and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _follow(self, jobs: Iterator[Callable[[], None]]) -> None:
        try:
            while True:
                with self._changed:  # a generator runs in one thread at a time
                    job = None if self._error is not None else next(jobs, None)
                if job is None:
                    return
                job()
        except BaseException as error:  # noqa: BLE001 - raised by `work`, in the thread that waits for it
            self._fail(error)
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()


def answered(check: Callable[[], None], question: Callable[[], T]) -> T:
    """The answer to something that is only looked at, which nobody waits for once `check` raises.

    A request hears of no cancel: botocore waits for its answer, and asks again, for minutes.
    """
    return Crew(1, check, patience=0.0).answer(question)
