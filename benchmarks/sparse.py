"""A live full of a mostly empty disk: 200 GiB with 1 GiB in 20,000 islands, where the default is 2 GiB of data."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figures import MIB, Figure
from benchmarks.measure import compared
from benchmarks.place import Place
from benchmarks.stores import Restic
from benchmarks.virtnbdbackup import Virtnbdbackup
from benchmarks.vmkeep import Vmkeep
from lab.domain_xml import DiskSpec

__all__ = ["rows"]

_ISLAND = 52 << 10  # bytes; 20,000 of them are 1 GiB
_CLUSTER = 64 << 10


def rows(place: Place, rounds: int) -> Iterator[Figure]:
    """The figures."""
    islands, size = 20_000 * place.data // (2048 * MIB), 100 * place.data
    content = place.folder / "islands.raw"
    _scatter(content, size, islands)
    disks = [DiskSpec(target="vda", size=size, content=content)]
    with place.live(disks) as vm, place.live(disks) as twin:
        content.unlink()
        store, ready = Restic(place), place.folder / "ready.qcow2"
        vmkeep, theirs = Vmkeep(place, store), Virtnbdbackup(place, twin)
        place.ready(vm, ready)
        ours = store.anew(store.repository, lambda: vmkeep.backup(vm, "--reset"))
        restic = store.anew(store.beside, lambda: store.put(ready))

        yield from compared(
            f"full of a disk of {size >> 30} GiB with {islands} islands",
            {"vmkeep": ours, "restic": restic, "virtnbdbackup": lambda: theirs.backup("full")},
            rounds,
        )


def _scatter(path: Path, size: int, islands: int) -> None:
    """A raw file with that many islands of data, each in a 64 KiB cluster of its own."""
    made = random.Random(1)
    with path.open("wb") as file:
        file.truncate(size)
        for number in sorted(made.sample(range(size // _CLUSTER), islands)):
            file.seek(number * _CLUSTER)
            file.write(made.randbytes(_ISLAND))
