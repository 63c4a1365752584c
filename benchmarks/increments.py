"""Increments of a live VM to restic and to a folder: beside virtnbdbackup's, and what they take beyond restic's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial

from benchmarks import dirt
from benchmarks.figures import Figure, Spread
from benchmarks.measure import Sample, costs, interleaved, ratio
from benchmarks.place import Place
from benchmarks.stores import Folder, Restic
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
    # A VM for each: what one backup finds dirty must not be another's change as well.
    with place.live() as vm, place.live() as second, place.live() as twin:
        store = Restic(place)
        vmkeep, to_folder = Vmkeep(place, store), Vmkeep(place, Folder(place), "folder")
        theirs = Virtnbdbackup(place, twin)
        vmkeep.backup(vm)
        store.share()
        to_folder.backup(second)
        theirs.backup("full")

        def restic(amount: int) -> Sample:
            # As many bytes as have changed, and some that stand for what a backup holds besides.
            fresh = place.folder / "dirty"
            fresh.write_bytes(os.urandom(amount + 64 * 1024))
            return store.put(fresh)

        for kind, (change, amount) in kinds.items():
            rivals: dict[str, Callable[[], Sample]] = {
                "vmkeep": _after(change, vm, partial(vmkeep.backup, vm)),
                "vmkeep to a folder": _after(change, second, partial(to_folder.backup, second)),
                "virtnbdbackup": _after(change, twin, partial(theirs.backup, "inc")),
                "restic": partial(restic, amount),
            }
            yield from _compared(f"increment, {kind}", interleaved(rivals, rounds))


def _after(change: Callable[[VM], None], vm: VM, work: Callable[[], Sample]) -> Callable[[], Sample]:
    """That work, each time after a change of the VM, which is not measured."""

    def changed() -> Sample:
        change(vm)
        return work()

    return changed


def _compared(what: str, taken: dict[str, list[Sample]]) -> Iterator[Figure]:
    for name, samples in taken.items():
        yield from costs(what, name, samples)
    yield from ratio(what, "vmkeep", "virtnbdbackup", taken, 0.5)
    yield from ratio(what, "vmkeep to a folder", "virtnbdbackup", taken, 0.5)
    beyond = [mine.wall - other.wall for mine, other in zip(taken["vmkeep"], taken["restic"], strict=True)]
    yield Figure(
        what=what, by="vmkeep - restic", measure="wall beyond", unit="s", spread=Spread.of(beyond), at_most=1.0
    )
