"""A VM of six disks: the full, which reads them side by side, and the restore of one of them."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.figures import MIB, Figure
from benchmarks.measure import compared
from benchmarks.place import Place
from benchmarks.stores import Restic
from benchmarks.virtnbdbackup import Virtnbdbackup
from benchmarks.vmkeep import Vmkeep
from lab.domain_xml import DiskSpec

__all__ = ["rows"]

_DISKS = ("vda", "vdb", "vdc", "vdd", "vde", "vdf")


def rows(place: Place, rounds: int) -> Iterator[Figure]:
    """The figures."""
    data = place.data // MIB // len(_DISKS) * MIB
    disks = [
        DiskSpec(target=target, size=2 * data, content=place.content(data, seed))
        for seed, target in enumerate(_DISKS, 2)
    ]
    with place.live(disks) as vm, place.live(disks) as twin:
        store, ready = Restic(place), [place.folder / f"disk.{target}.qcow2" for target in _DISKS]
        vmkeep, theirs = Vmkeep(place, store), Virtnbdbackup(place, twin)
        for target, path in zip(_DISKS, ready, strict=True):
            place.ready(vm, path, target)
        ours = store.anew(store.repository, lambda: vmkeep.backup(vm, "--reset"))
        restic = store.anew(store.beside, lambda: store.put_all(ready))

        yield from compared(
            "full of six disks",
            {"vmkeep": ours, "restic": restic, "virtnbdbackup": lambda: theirs.backup("full")},
            rounds,
        )
        source, fetched = vmkeep.taken[-1].source, place.folder / "fetched"
        yield from compared(
            "restore of one disk of six",
            {
                "vmkeep": lambda: vmkeep.restore("--disk", "vdc"),
                "restic dump": lambda: store.fetched(source, "disk.vdc.qcow2", fetched),
            },
            rounds,
            {"restic dump": 1.2},
        )
