"""A live full to a store and its restore, beside the tool's own transfer of the same bytes, and virtnbdbackup."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from benchmarks.figures import Figure
from benchmarks.measure import Sample, compared
from benchmarks.place import Place
from benchmarks.stores import Store
from benchmarks.virtnbdbackup import Virtnbdbackup
from benchmarks.vmkeep import Vmkeep

__all__ = ["full_to"]


def full_to(place: Place, rounds: int, store: Store, where: str, at_most: Mapping[str, float]) -> Iterator[Figure]:
    """The figures; `where` says in words what the store is, `at_most` are the targets of the full."""
    vm, ready, fetched = place.filled, place.folder / "ready.qcow2", place.folder / "fetched"
    vmkeep, theirs = Vmkeep(place, store), Virtnbdbackup(place, place.twin)
    place.ready(vm, ready)

    def ours() -> Sample:
        # As the tool's own copy, which is replaced: memory that a virtual machine has not used yet costs its host a
        # fault for each page, so the one who writes beside the last copy would take up to twice the time.
        vmkeep.delete()
        return vmkeep.backup(vm, "--reset")

    yield from compared(
        f"full to {where}",
        {
            "vmkeep": ours,
            store.tool: lambda: store.put(ready),
            "virtnbdbackup": lambda: theirs.backup("full"),
        },
        rounds,
        at_most,
    )
    source = vmkeep.taken[-1].source
    yield from compared(
        f"restore of a full from {where}",
        {
            "vmkeep": vmkeep.restore,
            store.tool: lambda: store.fetched(source, "disk.vda.qcow2", fetched),
            "virtnbdrestore": theirs.restore,
        },
        rounds,
        {store.tool: 1.2, "virtnbdrestore": 0.5},
    )
