"""A process tree, looked at while it runs: how much memory and how many descriptors it has."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["Watch"]

_SECONDS = 0.05
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Watch:
    """While the ``with`` block runs, the tree below process `root` is looked at twenty times a second.

    `memory` is the most that all its processes had resident at once, in bytes: what two of them share counts twice.
    `descriptors` is the most that one of them had open.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.memory = 0
        self.descriptors = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._look()
            if self._over.wait(_SECONDS):
                return

    def _look(self) -> None:
        memory = 0
        for process in _below(self._root):
            try:
                memory += int((process / "statm").read_text().split()[1]) * _PAGE
                self.descriptors = max(self.descriptors, len(os.listdir(process / "fd")))  # noqa: PTH208 - names alone
            except OSError:
                continue  # it has ended
        self.memory = max(self.memory, memory)


def _below(root: int) -> Iterator[Path]:
    process = Path(f"/proc/{root}")
    yield process
    try:
        children = [child for thread in (process / "task").iterdir() for child in _children(thread)]
    except OSError:
        return
    for child in children:
        yield from _below(child)


def _children(thread: Path) -> list[int]:
    try:
        return [int(child) for child in (thread / "children").read_text().split()]
    except OSError:
        return []
