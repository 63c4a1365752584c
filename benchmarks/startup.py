"""How long the command takes to say anything."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Spread, run
from benchmarks.vm import Place

__all__ = ["rows"]


def rows(_place: Place, rounds: int) -> Iterator[str]:
    """The lines of the table."""
    program = Path(sys.executable).with_name("vmkeep")
    taken = [run(program, "--help") for _ in range(rounds)]
    yield f"vmkeep --help: {Spread.of([one.wall for one in taken])} s"
