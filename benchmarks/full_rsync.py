"""A live full to a local folder by rsync and its restore, beside rsync of the ready file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from benchmarks.figures import Figure
from benchmarks.full_to import full_to
from benchmarks.place import Place
from benchmarks.stores import Folder

__all__ = ["rows"]


def rows(place: Place, rounds: int) -> Iterator[Figure]:
    """The figures."""
    with closing(Folder(place)) as store:
        yield from full_to(place, rounds, store, "a folder", {"rsync": 1.0})
