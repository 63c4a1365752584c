"""A flatten of a whole chain into one full, per store: what it takes, and how many bytes pass through this host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from benchmarks import dirt
from benchmarks.counted import Counted
from benchmarks.figures import MIB, Figure, Spread
from benchmarks.measure import Sample, costs
from benchmarks.place import Place
from benchmarks.stores import KINDS, S3, Store
from benchmarks.vmkeep import Vmkeep

__all__ = ["rows"]

_LONG, _SHORT = 20, 4
_THROUGH_HOST = 128  # MiB, for the short chain


def rows(place: Place, rounds: int) -> Iterator[Figure]:
    """The figures."""
    for kind in KINDS:
        with closing(kind(place)) as store:
            yield from _flattens(place, rounds, store, _LONG)
    with closing(S3(place)) as store:
        yield from _flattens(place, rounds, store, _SHORT, at_most=_THROUGH_HOST)


def _flattens(
    place: Place, rounds: int, store: Store, increments: int, at_most: float | None = None
) -> Iterator[Figure]:
    samples, moved = zip(
        *(_flatten(place, store, increments, f"{store.tool}-{increments}-{turn}") for turn in range(rounds)),
        strict=True,
    )
    what = f"flatten of a full and {increments} increments, {store.tool}"
    yield from costs(what, "vmkeep", samples)
    for measure, counts, limit in (
        ("bytes into the host", [one for one, _ in moved], None),
        ("bytes out of the host", [other for _, other in moved], None),
        ("bytes through the host", [one + other for one, other in moved], at_most),
    ):
        spread = Spread.of([count / MIB for count in counts])
        yield Figure(what=what, by="vmkeep", measure=measure, unit="MiB", spread=spread, at_most=limit)


def _flatten(place: Place, store: Store, increments: int, name: str) -> tuple[Sample, tuple[int, int]]:
    """One flatten of a chain that is made for it, by a vmkeep of its own; and the bytes that it moved, in and out."""
    some = dirt.percent(place.data)
    vmkeep = Vmkeep(place, store, name)
    with place.live() as vm:
        vmkeep.backup(vm)
        for number in range(increments):
            dirt.islands(vm, place.size, some, number)
            vmkeep.backup(vm)
    if not isinstance(store, S3):
        sample = vmkeep.flatten()
        return sample, (sample.inward, sample.outward)
    with Counted(store.server.port) as counted:
        vmkeep.config = place.configuration(name, store.at(counted.url))
        sample = vmkeep.flatten()
        return sample, (counted.received, counted.sent)
