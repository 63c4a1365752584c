"""How far a run is: a bar with rate and time left on a terminal, a line per phase elsewhere. Both on stderr."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from backupcore.context import Progress, Silent
from vmkeep.cli.asked import Asked
from vmkeep.cli.exits import one_line
from vmkeep.cli.figures import size

if TYPE_CHECKING:
    import rich.progress

__all__ = ["shown"]


class _Lines:
    """A line per phase, for logs."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._name = ""

    def phase(self, name: str, total: int | None = None) -> None:
        if name == self._name:
            return  # the driver counts the same phase in its own way
        self._name = name
        how_much = f" ({size(total)})" if total else ""
        click.echo(one_line(f"vmkeep: {self._subject}: {name}{how_much}"), err=True)

    def done(self, count: int) -> None:
        pass


class _Bar:
    """One bar, which each phase takes over in turn."""

    def __init__(self, bars: rich.progress.Progress, subject: str) -> None:
        self._bars = bars
        self._subject = subject
        self._lock = threading.Lock()
        self._task: rich.progress.TaskID | None = None

    def phase(self, name: str, total: int | None = None) -> None:
        with self._lock:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task = self._bars.add_task(one_line(f"{self._subject}: {name}"), total=total)

    def done(self, count: int) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=count)


@contextmanager
def shown(asked: Asked, subject: str) -> Iterator[Progress]:
    """A Progress for the block, as the user wants it: nothing with -q, and with --json only on a terminal."""
    terminal = sys.stderr.isatty()
    if asked.quiet or (asked.json and not terminal):
        yield Silent()
    elif not terminal:
        yield _Lines(subject)
    else:
        import rich.progress  # noqa: PLC0415 - 0.1 s, on a terminal only
        from rich.console import Console  # noqa: PLC0415 - 0.1 s, on a terminal only
        from rich.progress import (  # noqa: PLC0415 - as above
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with rich.progress.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            yield _Bar(bars, subject)
