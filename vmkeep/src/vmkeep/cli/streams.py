"""Stdout and stderr that cannot be written to: a full disk below a log, a pipe that nobody reads. No run fails of them.

What cannot be told on stderr is dropped. What cannot be told on stdout is, too, and known at the end: whoever reads it
must not take a part for the whole.
"""

from __future__ import annotations

import io
import sys
from typing import TextIO

from vmkeep.cli import stdout

__all__ = ["lost", "put_in_place"]


class _Stream(io.TextIOWrapper):
    """A text stream whose writes never fail; `lost` is why the first of them did. Its `buffer` fails as any does."""

    lost: OSError | None = None
    before: TextIO  # kept, since it would close the file with its own end

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self.lost = self.lost or error
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self.lost = self.lost or error


def _instead_of(stream: TextIO) -> TextIO:
    made = _Stream(
        stream.buffer,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=bool(stream.line_buffering),
        write_through=bool(getattr(stream, "write_through", False)),
    )
    made.before = stream
    return made


def put_in_place() -> None:
    """Let such streams be this process's stdout and stderr."""
    sys.stdout = _instead_of(sys.stdout)
    sys.stderr = _instead_of(sys.stderr)


def lost() -> OSError | None:
    """Why something of what was printed on stdout has not arrived there; None if it has, as far as is known.

    What has not goes nowhere from then on: the interpreter would try it again at its end, and complain.
    """
    own = stdout.own()
    own.flush()
    if not isinstance(own, _Stream) or own.lost is None:
        return None
    stdout.discard()
    return own.lost
