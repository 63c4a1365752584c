"""The guest's own view: what a synced write of 4 KiB takes in it, while nothing runs, and during each kind of full."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.figures import Figure, Spread
from benchmarks.measure import Sample, costs, interleaved, run, together
from benchmarks.place import Place
from benchmarks.stores import Folder, Restic
from benchmarks.virtnbdbackup import Virtnbdbackup
from benchmarks.vmkeep import Vmkeep
from lab import kernel
from lab.vm import VM

__all__ = ["rows"]

_WHAT = "synced writes of a guest"
_IDLE = 10  # seconds
_LINE = r"^((?:\d+ )+)took\r?$"
_OURS = ("vmkeep to restic", "vmkeep to a folder")
_THEIRS = "virtnbdbackup"
_AT_MOST = 1.1  # of virtnbdbackup's, for the 99th percentile
# A full as it is taken without changed block tracking: the guest writes to an overlay, which is merged afterwards.
_STAGED = """set -e
virsh -q -c "$1" snapshot-create-as "$2" --disk-only --atomic --no-metadata --diskspec "vda,file=$3"
qemu-img convert -U -O qcow2 "$4" "$5"
virsh -q -c "$1" blockcommit "$2" vda --active --pivot --wait
rm "$3"
"""
# What any full of a running VM asks of QEMU, without all that is ours: a pull job, read by a program in C.
_PULLED = """set -e
virsh -q -c "$1" backup-begin "$2" "$3"
nbdcopy --flush "nbd+unix:///vda?socket=$4" "$5"
virsh -q -c "$1" domjobabort "$2"
"""
_JOB = """<domainbackup mode="pull"><server transport="unix" socket="{socket}"/>
<disks><disk name="vda" backup="yes" type="file"><scratch file="{scratch}"/></disk></disks></domainbackup>
"""


@dataclass(frozen=True)
class _View:
    """One round of one work, and the guest's latencies meanwhile, in milliseconds."""

    sample: Sample
    latencies: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.latencies)

    @property
    def high(self) -> float:
        """The 99th percentile."""
        return sorted(self.latencies)[len(self.latencies) * 99 // 100]

    @property
    def worst(self) -> float:
        return max(self.latencies)


def rows(place: Place, rounds: int) -> Iterator[Figure]:
    """The figures. No work leaves a checkpoint: all are on one VM, which virtnbdbackup would refuse otherwise."""
    program = place.folder / "synced-writes"
    sources = Path(__file__).parent
    compiler = ["gcc", "-O2", "-static", "-o", str(program), str(sources / "synced-writes.c")]
    subprocess.run(compiler, check=True)
    linux = kernel.running(sources / "guest-init.sh", program, place.folder / "initramfs.gz")
    with place.live(kernel=linux, memory_mib=192) as vm, closing(Folder(place)) as folder:
        vm.wait_for_console(f"(?m){_LINE}")
        works = {name: partial(_seen, vm, work) for name, work in _works(place, vm, folder).items()}
        views = interleaved(works, rounds)
    for name, found in views.items():
        yield from costs(_WHAT, name, [one.sample for one in found])
        for measure, figures in {
            "latency, median": [one.median for one in found],
            "latency, 99th percentile": [one.high for one in found],
            "latency, worst": [one.worst for one in found],
        }.items():
            yield Figure(what=_WHAT, by=name, measure=measure, unit="ms", spread=Spread.of(figures))
    yield from _ratios(views)


def _works(place: Place, vm: VM, folder: Folder) -> Mapping[str, Callable[[], Sample]]:
    store = Restic(place)
    to_restic = Vmkeep(place, store, "restic", 'mode = "FULL"')
    to_folder = Vmkeep(place, folder, "rsync", 'mode = "FULL"')
    at_rest = Vmkeep(place, folder, "at-rest", 'mode = "FULL"\nfs_freeze = "SUSPEND"')
    theirs = Virtnbdbackup(place, vm)
    overlay, staged = vm.folder / "overlay.qcow2", place.folder / "staged.qcow2"

    def restic() -> Sample:
        shutil.rmtree(store.repository, ignore_errors=True)
        return to_restic.backup(vm)

    def rsync(vmkeep: Vmkeep) -> Sample:
        taken = vmkeep.backup(vm)
        shutil.rmtree(folder.target)
        folder.target.mkdir()
        return taken

    def staging() -> Sample:
        shutil.rmtree(store.beside, ignore_errors=True)
        arguments = (place.uri, vm.name, overlay, vm.disk("vda"), staged)
        try:
            return together(run("sh", "-c", _STAGED, "staged", *arguments), store.put(staged))
        finally:
            staged.unlink(missing_ok=True)

    job, socket, pulled = place.folder / "job.xml", place.vms / "pulled.sock", place.folder / "pulled.raw"
    job.write_text(_JOB.format(socket=socket, scratch=vm.folder / "pulled.scratch"))

    def nbdcopy() -> Sample:
        try:
            return run("sh", "-c", _PULLED, "pulled", place.uri, vm.name, job, socket, pulled)
        finally:
            pulled.unlink(missing_ok=True)

    return {
        "no backup": lambda: run("sleep", str(_IDLE)),
        _OURS[0]: restic,
        _OURS[1]: lambda: rsync(to_folder),
        "vmkeep to a folder, FS_FREEZE=SUSPEND": lambda: rsync(at_rest),
        _THEIRS: lambda: theirs.backup("copy"),
        "staging, restic": staging,
        "nbdcopy to a file": nbdcopy,
    }


def _ratios(views: Mapping[str, Sequence[_View]]) -> Iterator[Figure]:
    for name, found in views.items():
        if name == _THEIRS:
            continue
        ratios = [ours.high / theirs.high for ours, theirs in zip(found, views[_THEIRS], strict=True)]
        yield Figure(
            what=_WHAT,
            by=f"{name} : {_THEIRS}",
            measure="99th percentile ratio",
            unit="",
            spread=Spread.of(ratios),
            at_most=_AT_MOST if name in _OURS else None,
        )


def _seen(vm: VM, work: Callable[[], Sample]) -> _View:
    """The guest prints a line for every 20 writes: those whose line came during the work count."""
    before = len(vm.console())
    sample = work()
    lines = re.findall(_LINE, vm.console()[before:], re.MULTILINE)
    latencies = [int(one) / 1000 for line in lines for one in line.split()]
    if not latencies:
        raise RuntimeError(f"the guest wrote nothing during {sample.commands}")
    return _View(sample, latencies)
