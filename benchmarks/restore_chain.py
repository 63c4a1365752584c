"""The restore of a chain of 20 increments from each store, beside the tool's own fetch of the final bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from benchmarks import dirt
from benchmarks.figures import Figure
from benchmarks.measure import compared
from benchmarks.place import Place
from benchmarks.stores import KINDS, Store
from benchmarks.virtnbdbackup import Virtnbdbackup
from benchmarks.vmkeep import Vmkeep

__all__ = ["rows"]

_INCREMENTS = 20


def rows(place: Place, rounds: int) -> Iterator[Figure]:
    """The figures."""
    with place.live() as twin:
        theirs = Virtnbdbackup(place, twin)
        theirs.backup("full")
        for number in range(_INCREMENTS):
            dirt.islands(twin, place.size, dirt.percent(place.data), number)
            theirs.backup("inc")
        for kind in KINDS:
            with closing(kind(place)) as store:
                yield from _restores(place, rounds, store, theirs)


def _restores(place: Place, rounds: int, store: Store, theirs: Virtnbdbackup) -> Iterator[Figure]:
    ready, fetched = place.folder / "ready.qcow2", place.folder / "fetched"
    vmkeep = Vmkeep(place, store, store.tool)
    with place.live() as vm:
        vmkeep.backup(vm)
        for number in range(_INCREMENTS):
            dirt.islands(vm, place.size, dirt.percent(place.data), number)
            vmkeep.backup(vm)
        vm.flush("vda")
        ready.unlink(missing_ok=True)
        place.ready(vm, ready)
    store.put(ready)
    yield from compared(
        f"restore of a full and {_INCREMENTS} increments, {store.tool}",
        {"vmkeep": vmkeep.restore, store.tool: lambda: store.got(fetched), "virtnbdrestore": theirs.restore},
        rounds,
        {store.tool: 1.2, "virtnbdrestore": 0.5},
    )
