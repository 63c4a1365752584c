"""A live full to a local restic repository, beside restic on the ready file, a staging file, and virtnbdbackup."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.figures import Figure
from benchmarks.measure import Sample, compared, together
from benchmarks.place import Place
from benchmarks.stores import Restic
from benchmarks.virtnbdbackup import Virtnbdbackup
from benchmarks.vmkeep import Vmkeep

__all__ = ["rows"]


def rows(place: Place, rounds: int) -> Iterator[Figure]:
    """The figures."""
    vm, ready, staged = place.filled, place.folder / "ready.qcow2", place.folder / "staged.qcow2"
    store = Restic(place)
    vmkeep, theirs = Vmkeep(place, store), Virtnbdbackup(place, place.twin)
    place.ready(vm, ready)
    ours = store.anew(store.repository, lambda: vmkeep.backup(vm, "--reset"))
    restic = store.anew(store.beside, lambda: store.put(ready))

    def staged_first() -> Sample:
        try:
            return together(place.ready(vm, staged), store.put(staged))
        finally:
            staged.unlink(missing_ok=True)

    yield from compared(
        "full to a new restic repository",
        {
            "vmkeep": ours,
            "restic": restic,
            "virtnbdbackup": lambda: theirs.backup("full"),
            "staging": store.anew(store.beside, staged_first),
        },
        rounds,
        {"restic": 1.15, "virtnbdbackup": 0.9, "staging": 0.6},
    )
    store.share()
    store.put(ready)
    yield from compared(
        "second full to the same repository",
        {"vmkeep": lambda: vmkeep.backup(vm, "--reset"), "restic": lambda: store.put(ready)},
        rounds,
        {"restic": 1.15},
    )
    source, fetched = vmkeep.taken[-1].source, place.folder / "fetched"
    yield from compared(
        "restore of a full from restic",
        {
            "vmkeep": vmkeep.restore,
            "restic dump": lambda: store.fetched(source, "disk.vda.qcow2", fetched),
            "virtnbdrestore": theirs.restore,
        },
        rounds,
        {"restic dump": 1.2, "virtnbdrestore": 0.5},
    )
    store.close()
