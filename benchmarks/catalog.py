"""A catalog of 2,000 VMs with 50 increments each, so 100,000: the list, one image, and what retention would do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing

from benchmarks.figures import Figure
from benchmarks.measure import Sample, costs, interleaved, run
from benchmarks.place import Place
from benchmarks.stores import Folder
from benchmarks.vmkeep import Vmkeep
from lab import many_images
from vmkeep.catalog.database import Catalog

__all__ = ["rows"]

_VMS, _INCREMENTS = 2000, 50


def rows(place: Place, rounds: int) -> Iterator[Figure]:
    """The figures."""
    with closing(Folder(place)) as store:
        vmkeep = Vmkeep(place, store)
        path = vmkeep.state / "catalog.sqlite"
        many_images.fill(Catalog.open(path), vms=_VMS, increments=_INCREMENTS)
        works: dict[str, Callable[[], Sample]] = {
            "image list": lambda: vmkeep.ask("image", "list"),
            "image show": lambda: vmkeep.ask("image", "show", str(_VMS // 2)),
            "vm's own image list": lambda: vmkeep.ask("image", "list", "--vm", f"vm{_VMS // 2}"),
            "retention plan of all VMs": lambda: run(sys.executable, "-m", "benchmarks.plan", path),
        }
        for work in works.values():
            work()  # from here on the files are in the page cache
        taken = interleaved(works, rounds)
    for name, samples in taken.items():
        yield from costs(f"{name}, {_VMS} VMs of {_INCREMENTS} increments", "vmkeep", samples, 1.0)
