"""Ten VMs at once to one restic repository, beside one after the other, and virtnbdbackup of the ten at once."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.figures import MIB, Figure, Spread
from benchmarks.measure import Sample, costs, interleaved, ratio, run, together, while_reading
from benchmarks.place import Place
from benchmarks.stores import Restic
from benchmarks.virtnbdbackup import Virtnbdbackup
from benchmarks.vmkeep import Vmkeep
from lab.domain_xml import DiskSpec

__all__ = ["rows"]

_VMS = 10


def rows(place: Place, rounds: int) -> Iterator[Figure]:
    """The figures."""
    data = place.data // MIB // _VMS * MIB
    with ExitStack() as stack:
        vms = [
            stack.enter_context(
                place.live([DiskSpec(target="vda", size=2 * data, content=place.content(data, 10 + number))])
            )
            for number in range(_VMS)
        ]
        names = [vm.name for vm in vms]
        store = Restic(place)
        vmkeep = Vmkeep(place, store)
        theirs = [Virtnbdbackup(place, vm) for vm in vms]

        def renew() -> None:
            shutil.rmtree(store.repository, ignore_errors=True)
            store.make()  # ten that find none would all make it

        def ours() -> Sample:
            renew()
            return while_reading(names, lambda: _at_once([vmkeep.command("backup", name, "--reset") for name in names]))

        def in_turn() -> Sample:
            renew()
            return together(*(vmkeep.backup(vm, "--reset") for vm in vms))

        def virtnbdbackup() -> Sample:
            for one in theirs:
                one.forget()
            # "copy" leaves the checkpoints of vmkeep alone, and makes none.
            return while_reading(names, lambda: _at_once([one.command("copy") for one in theirs]))

        what = f"{_VMS} VMs to one restic repository"
        taken = interleaved({"vmkeep": ours, "vmkeep in turn": in_turn, "virtnbdbackup": virtnbdbackup}, rounds)
    for name, samples in taken.items():
        yield from costs(what, name, samples)
        gib = _VMS * data / (1 << 30)
        per_gib = {"processor per GiB": ("s", [one.processor / gib for one in samples])}
        per_gib["memory per GiB"] = ("MiB", [one.memory / MIB / gib for one in samples])
        for measure, (unit, figures) in per_gib.items():
            yield Figure(what=what, by=name, measure=measure, unit=unit, spread=Spread.of(figures))
    yield from ratio(what, "vmkeep", "vmkeep in turn", taken)
    yield from ratio(what, "vmkeep", "virtnbdbackup", taken)


def _at_once(commands: Sequence[Sequence[str | Path]]) -> Sample:
    words: list[str | Path] = []
    for command in commands:
        words += [*command, "--"]
    return run(sys.executable, "-m", "benchmarks.at_once", *words[:-1])
