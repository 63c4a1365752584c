"""How long the call takes that fixes the instant, in which a guest may stand still: images made before, or by libvirt.

The same VM, by turns: a backup job with its checkpoint, and overlays, for 1, 6 and 12 disks.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_lowercase

import libvirt

from backupcore.model import new_id
from backupcore_libvirt.backup_job import backup_xml
from backupcore_libvirt.checkpoint import checkpoint_name, checkpoint_xml
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.premade.image import make_empty, make_overlay
from backupcore_libvirt.scratch import Owner
from benchmarks.figures import MIB, Figure, Spread
from benchmarks.place import Place
from lab.domain_xml import DiskSpec
from lab.vm import VM

__all__ = ["rows"]

_DISKS = (1, 6, 12)
_SIZE = 16 * MIB
_LIMIT = 60.0
_OURS, _THEIRS = "made before", "made by libvirt"
_OVERLAYS = (
    libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
)


def rows(place: Place, rounds: int) -> Iterator[Figure]:
    """The figures: seconds of the call alone, what making the images takes before it, and the ratio of the calls."""
    for count in _DISKS:
        targets = [f"vd{letter}" for letter in ascii_lowercase[:count]]
        with place.live([DiskSpec(target=target, size=_SIZE) for target in targets]) as vm:
            # The folder of the VM belongs to QEMU's user.
            folder = RunFolder(vm.folder, new_id())
            folder.path.mkdir(mode=0o700)
            _give(folder.path, vm.folder)
            works = {"backup job": _Work(vm, targets, folder, _job), "overlays": _Work(vm, targets, folder, _overlays)}
            for name, work in works.items():
                for _ in range(rounds):
                    work.round()
                yield from work.figures(f"{name} of {count} disk{'s' if count > 1 else ''} begins")


@dataclass
class _Work:
    """One kind of call. `begin` makes images where it is told to, calls, ends what it began: seconds of both."""

    vm: VM
    targets: list[str]
    folder: RunFolder
    begin: Callable[[VM, list[str], RunFolder, bool], tuple[float, float]]
    calls: dict[str, list[float]] = field(default_factory=lambda: {_OURS: [], _THEIRS: []})
    making: list[float] = field(default_factory=list)

    def round(self) -> None:
        for by in (_OURS, _THEIRS):
            making, call = self.begin(self.vm, self.targets, self.folder, by == _OURS)
            self.calls[by].append(call)
            if by == _OURS:
                self.making.append(making)

    def figures(self, what: str) -> Iterator[Figure]:
        for by, seconds in self.calls.items():
            yield Figure(what=what, by=by, measure="wall", unit="s", spread=Spread.of(seconds))
        yield Figure(what=what, by=_OURS, measure="making the images", unit="s", spread=Spread.of(self.making))
        ratios = [ours / theirs for ours, theirs in zip(self.calls[_OURS], self.calls[_THEIRS], strict=True)]
        yield Figure(what=what, by=f"{_OURS} : {_THEIRS}", measure="wall ratio", unit="", spread=Spread.of(ratios))


def _job(vm: VM, targets: list[str], folder: RunFolder, made: bool) -> tuple[float, float]:
    point = new_id()
    began = time.monotonic()
    owner = folder.path.stat()
    for target in targets if made else ():
        make_empty(folder.disk(target), _SIZE, Owner(owner.st_uid, owner.st_gid))
    ready = time.monotonic()
    vm.domain.backupBegin(
        backup_xml(targets, folder, folder.socket, {}),
        checkpoint_xml(checkpoint_name(point), targets, targets),
        libvirt.VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL if made else 0,
    )
    done = time.monotonic()
    vm.domain.abortJob()
    _wait(lambda: vm.domain.jobInfo()[0] == 0)
    vm.domain.checkpointLookupByName(f"backupcore-{point}").delete()
    for target in targets:
        folder.disk(target).unlink(missing_ok=True)
    return ready - began, done - ready


def _overlays(vm: VM, targets: list[str], folder: RunFolder, made: bool) -> tuple[float, float]:
    below = {target: vm.disk(target) for target in targets}
    above = {target: path.with_name(f"{target}.{folder.run}.{next(_numbers)}") for target, path in below.items()}
    began = time.monotonic()
    for target in targets if made else ():
        make_overlay(above[target], _SIZE, str(below[target]), "qcow2")
    ready = time.monotonic()
    listed = "".join(f"<disk name='{target}'><source file='{above[target]}'/></disk>" for target in targets)
    flags = _OVERLAYS | (libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT if made else 0)
    vm.domain.snapshotCreateXML(f"<domainsnapshot><disks>{listed}</disks></domainsnapshot>", flags)
    done = time.monotonic()
    for target in targets:
        vm.domain.blockCommit(target, None, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
        _wait(lambda target=target: _pivoted(vm, target))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
        above[target].unlink()
    return ready - began, done - ready


_numbers = itertools.count(1)


def _pivoted(vm: VM, target: str) -> bool:
    with contextlib.suppress(libvirt.libvirtError):  # not yet ready
        vm.domain.blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
        return True
    return False


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _LIMIT
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("libvirt did not end what was begun")
        time.sleep(0.01)


def _give(path: Path, model: Path) -> None:
    found = model.stat()
    os.chown(path, found.st_uid, found.st_gid)
