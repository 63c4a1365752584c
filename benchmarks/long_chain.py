"""A chain of 200 increments: restoring it takes no more memory or descriptors than restoring the first 20 of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from benchmarks import dirt
from benchmarks.figures import MIB, Figure, Spread
from benchmarks.measure import costs, interleaved
from benchmarks.place import Place
from benchmarks.stores import Folder
from benchmarks.vmkeep import Vmkeep
from lab.domain_xml import DiskSpec

__all__ = ["rows"]

_SHORT = 20


def rows(place: Place, rounds: int) -> Iterator[Figure]:
    """The figures; 200 increments where there are 2 GiB of data, fewer for less."""
    count = max(200 * place.data // (2048 * MIB), _SHORT + 1)
    size = max(place.data // 8 // MIB, 16) * MIB
    disk = DiskSpec(target="vda", size=2 * size, content=place.content(size))
    with closing(Folder(place)) as store, place.live([disk]) as vm:
        vmkeep = Vmkeep(place, store)
        for number in range(count + 1):
            dirt.islands(vm, 2 * size, 8 * dirt.ISLAND, number)
            vmkeep.backup(vm)
        taken = interleaved(
            {
                str(count): vmkeep.restore,
                str(_SHORT): lambda: vmkeep.restore("--increment", str(_SHORT)),
            },
            rounds,
        )
    for length, samples in taken.items():
        what = f"restore of a full and {length} increments, {size // MIB} MiB"
        yield from costs(what, "vmkeep", samples)
        open_files = Spread.of([one.descriptors for one in samples])
        yield Figure(what=what, by="vmkeep", measure="descriptors", unit="", spread=open_files)
    for measure, found in (
        ("memory", [(long.memory, short.memory) for long, short in zip(*taken.values(), strict=True)]),
        ("descriptors", [(long.descriptors, short.descriptors) for long, short in zip(*taken.values(), strict=True)]),
    ):
        yield Figure(
            what=f"restore of a long chain, {size // MIB} MiB",
            by=f"{count} : {_SHORT} increments",
            measure=f"{measure} ratio",
            unit="",
            spread=Spread.of([long / max(short, 1) for long, short in found]),
            at_most=1.5,
        )
