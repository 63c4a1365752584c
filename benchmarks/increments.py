"""Increments of a live VM to restic: beside virtnbdbackup's, and what they take beyond restic's own time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from benchmarks import dirt
from benchmarks.figures import Figure, Spread
from benchmarks.measure import Sample, costs, interleaved, ratio
from benchmarks.place import Place
from benchmarks.stores import Restic
from benchmarks.virtnbdbackup import Virtnbdbackup
from benchmarks.vmkeep import Vmkeep
from lab.vm import VM

__all__ = ["rows"]


def rows(place: Place, rounds: int) -> Iterator[Figure]:
    """The figures."""
    some = dirt.percent(place.data)
    kinds: dict[str, tuple[Callable[[VM], None], int]] = {
        "nothing dirty": (lambda _vm: None, 0),
        "1 % dirty in one place": (lambda vm: dirt.one_place(vm, some), some),
        "1 % dirty in 64 KiB islands": (lambda vm: dirt.islands(vm, place.size, some), some),
        "all zeroed": (lambda vm: dirt.zeroes(vm, place.size), 0),
    }
    with place.live() as vm, place.live() as twin:
        store = Restic(place)
        vmkeep, theirs = Vmkeep(place, store), Virtnbdbackup(place, twin)
        vmkeep.backup(vm)
        store.share()
        theirs.backup("full")
        for kind, (change, amount) in kinds.items():
            yield from _increments(place, rounds, kind, vm, twin, vmkeep, theirs, store, change, amount)


def _increments(
    place: Place,
    rounds: int,
    kind: str,
    vm: VM,
    twin: VM,
    vmkeep: Vmkeep,
    theirs: Virtnbdbackup,
    store: Restic,
    change: Callable[[VM], None],
    amount: int,
) -> Iterator[Figure]:
    fresh = place.folder / "dirty"

    def ours() -> Sample:
        change(vm)
        return vmkeep.backup(vm)

    def virtnbdbackup() -> Sample:
        change(twin)
        return theirs.backup("inc")

    def restic() -> Sample:
        # As many bytes as have changed, and some that stand for what a backup holds besides.
        fresh.write_bytes(os.urandom(amount + 64 * 1024))
        return store.put(fresh)

    what = f"increment, {kind}"
    taken = interleaved({"vmkeep": ours, "virtnbdbackup": virtnbdbackup, "restic": restic}, rounds)
    for name, samples in taken.items():
        yield from costs(what, name, samples)
    yield from ratio(what, "vmkeep", "virtnbdbackup", taken, 0.5)
    beyond = [mine.wall - other.wall for mine, other in zip(taken["vmkeep"], taken["restic"], strict=True)]
    yield Figure(
        what=what, by="vmkeep - restic", measure="wall beyond", unit="s", spread=Spread.of(beyond), at_most=1.0
    )
