"""What it costs that an increment has to prove that its disk is the same: marks, stamps and probes, beside one without.

The same VM, by turns: what is done of an increment before the datastore gets anything, and the release; no disk has
changed. Running and off, with 1 and with 6 disks, one of which holds data.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_lowercase
from unittest.mock import patch

from backupcore import model
from backupcore.context import Context
from backupcore.model import BackupRun, Disk, Link, Outcome, Prepared, RunState, Type, new_id
from backupcore_libvirt import look
from backupcore_libvirt.mechanisms import mechanism, off_nbd
from backupcore_libvirt.plugin import Libvirt
from backupcore_libvirt.reading import taken
from benchmarks.figures import MIB, Figure, Spread
from benchmarks.place import Place
from lab.domain_xml import DiskSpec
from lab.vm import VM

__all__ = ["rows"]

_COUNTS = (1, 6)
_SIZE = 64 * MIB
_AT_MOST = 0.05  # seconds for each disk
_WITH, _WITHOUT = "with the proof", "without"


def rows(place: Place, rounds: int) -> Iterator[Figure]:
    """The figures: seconds of both, their ratio, and what the proof takes for each disk."""
    for count in _COUNTS:
        disks = [DiskSpec(target="vda", size=place.size, content=place.content(place.data))]
        disks += [DiskSpec(target=f"vd{letter}", size=_SIZE) for letter in ascii_lowercase[1:count]]
        with place.live(disks) as vm:
            for running in (True, False):
                if not running:
                    vm.destroy()
                work = _Work(Libvirt(place.uri, place.vms / "scratch"), vm, place.folder)
                work.round()  # the first of each is a full
                work.seconds = {_WITH: [], _WITHOUT: []}
                for _ in range(rounds):
                    work.round()
                state = "running" if running else "off"
                yield from work.figures(f"increment of {count} disk{'s' if count > 1 else ''}, {state}", count)


@dataclass
class _Work:
    """Two chains of one VM."""

    hypervisor: Libvirt
    vm: VM
    folder: Path
    seconds: dict[str, list[float]] = field(default_factory=lambda: {_WITH: [], _WITHOUT: []})
    last: dict[str, tuple[BackupRun, Prepared]] = field(default_factory=dict)

    def round(self) -> None:
        # Neither shall always be the one that comes second.
        for by in (_WITH, _WITHOUT) if len(self.seconds[_WITH]) % 2 == 0 else (_WITHOUT, _WITH):
            with contextlib.nullcontext() if by == _WITH else _without():
                self._take(by)

    def _take(self, by: str) -> None:
        before = self.last.get(by)
        run = BackupRun(
            id=new_id(),
            vm=model.VM(uuid=self.vm.uuid, name=self.vm.name),
            host="here",
            datastore=by,
            image="0" * 32,
            number=1 if before else 0,
            point=new_id(),
            type=Type.INCREMENT if before else Type.FULL,
            parent=Link(point=before[0].point, digest="0" * 64, disks=before[1].disks) if before else None,
            spent=(before[0].point,) if before else (),
            keep=tuple(one.point for one, _ in self.last.values()),
        )
        folder = self.folder / run.id
        folder.mkdir(mode=0o700)
        began = time.monotonic()
        with Context(folder) as ctx:
            prepared = self.hypervisor.prebackup(run, ctx)
            for artifact in prepared.artifacts:
                artifact.close()
            self.hypervisor.postbackup(replace(run, spent=()), Outcome(state=RunState.RECORDED), ctx)
        self.seconds[by].append(time.monotonic() - began)
        if before and any(disk.whole for disk in prepared.disks):
            raise RuntimeError(f"no increment was taken: {prepared.disks}")
        self.last[by] = run, prepared

    def figures(self, what: str, disks: int) -> Iterator[Figure]:
        for by, seconds in self.seconds.items():
            yield Figure(what=what, by=by, measure="wall", unit="s", spread=Spread.of(seconds))
        pairs = list(zip(self.seconds[_WITH], self.seconds[_WITHOUT], strict=True))
        both = f"{_WITH} : {_WITHOUT}"
        ratios = Spread.of([proved / believed for proved, believed in pairs])
        yield Figure(what=what, by=both, measure="wall ratio", unit="", spread=ratios)
        beyond = Spread.of([(proved - believed) / disks for proved, believed in pairs])
        yield Figure(what=what, by=both, measure="wall beyond, a disk", unit="s", spread=beyond, at_most=_AT_MOST)


@contextlib.contextmanager
def _without() -> Iterator[None]:
    """An increment as it was before it had to prove anything."""

    def believed(*_: object) -> tuple[str, tuple[()]]:
        return "", ()

    def disk(*arguments: object, **values: object) -> Disk:
        return Disk(*arguments, **{**values, "marked": False, "below": None})  # type: ignore[arg-type]  # as taken_of gives them

    with (
        patch.object(mechanism, "add", lambda *_: frozenset()),
        patch.object(off_nbd, "add_stopped", lambda *_: frozenset()),
        patch.object(look, "stamps_below", lambda *_: ()),
        patch.object(taken, "_proved", believed),
        patch.object(taken, "Disk", disk),
        patch.object(taken, "places", lambda _: []),
    ):
        yield
