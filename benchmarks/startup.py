"""How long the command takes to say anything."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.figures import Figure
from benchmarks.measure import costs, run
from benchmarks.place import Place
from benchmarks.vmkeep import PROGRAM

__all__ = ["rows"]


def rows(_place: Place, rounds: int) -> Iterator[Figure]:
    """The figures."""
    run(PROGRAM, "--help")  # from here on the files are in the page cache
    yield from costs("vmkeep --help", "vmkeep", [run(PROGRAM, "--help") for _ in range(rounds)])
