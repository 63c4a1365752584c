"""A live full to an S3 server and its restore, beside boto3's own transfer of the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from benchmarks.figures import Figure
from benchmarks.full_to import full_to
from benchmarks.place import Place
from benchmarks.stores import S3

__all__ = ["rows"]


def rows(place: Place, rounds: int) -> Iterator[Figure]:
    """The figures."""
    with closing(S3(place)) as store:
        yield from full_to(place, rounds, store, "S3", {"boto3": 1.15})
