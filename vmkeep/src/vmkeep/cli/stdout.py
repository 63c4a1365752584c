"""Our standard output, which is one document with --json, and what plugins print, which is none of it.

While a command is at work, `print` of a driver, a site plugin, their libraries and threads goes to stderr. In a process
of ours descriptor 1 is stderr's as well, so what their children and C libraries write goes there, too.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

__all__ = ["discard", "flush", "hidden", "own", "take"]

_hidden: list[TextIO] = []
_taken = False


class _Own(io.FileIO):
    """The real standard output under another number, as long as it is that."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "wb")
        self._is = self._identity()
        self._nowhere = False

    def write(self, data: Any) -> int:
        if self._nowhere:
            return len(data)
        # A plugin that closes files which are not its own: the number may be the catalog's by now.
        if self._identity() != self._is:
            raise OSError(errno.EBADF, "a plugin has closed it")
        return super().write(data)

    def let_go(self) -> None:
        """Point the number at nothing, if it is still ours; a close would give it to a file of somebody else's."""
        self._nowhere = True
        if self._identity() != self._is:
            return
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, self.fileno(), inheritable=False)
        os.close(nowhere)

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = os.fstat(self.fileno())
        except OSError:
            return None
        return found.st_dev, found.st_ino


def take() -> None:
    """Keep descriptor 1 for ourselves, for good: others who write to it write to stderr from now on."""
    global _taken  # noqa: PLW0603 - there is one standard output
    encoding, errors = sys.stdout.encoding, sys.stdout.errors or "strict"
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    raw = _Own(os.dup(1))
    os.dup2(2, 1)
    # Whoever reads our output waits for the end of all who hold it, also of a process that a driver has forked.
    os.register_at_fork(after_in_child=raw.let_go)
    terminal = raw.isatty()
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors=errors, line_buffering=terminal)
    _taken = True


@contextmanager
def hidden() -> Iterator[None]:
    """While the block runs `print` goes to stderr, and only `own` leads to the standard output.

    It stays so afterwards where `take` was called: a thread of a plugin may print when all has been told.
    """
    if _hidden:
        yield
        return
    _hidden.append(sys.stdout)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        if not _taken:
            sys.stdout = _hidden.pop()


def own() -> TextIO:
    """Where the results of a command go."""
    return _hidden[0] if _hidden else cast("TextIO", sys.stdout)


def discard() -> None:
    """Have what goes to our standard output go nowhere from now on."""
    raw = getattr(getattr(own(), "buffer", None), "raw", None)
    if isinstance(raw, _Own):
        raw.let_go()


def flush() -> None:
    """Have it written, as far as it still can be."""
    for stream in (own(), sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
