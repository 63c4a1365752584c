"""A running VM held by libvirt's backup job, and by temporary overlays: what the guest sees, the room, the end."""

from __future__ import annotations

import re
import statistics
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.figures import MIB, Figure, Spread
from benchmarks.measure import Sample, costs, interleaved, run
from benchmarks.place import Place
from benchmarks.stores import Folder
from benchmarks.vmkeep import Vmkeep
from lab import kernel
from lab.domain_xml import DiskSpec
from lab.vm import VM

__all__ = ["rows"]

_IDLE = 10  # seconds
_LINE = r"^((?:\d+ )+)took\r?$"
_PER_WRITE = {"calm": 4096, "hard": 256 << 10}  # bytes; see guest-init.sh
_WAYS = {"a backup job": "", "temporary overlays": "iothread='1'"}
"""What holds the VM, and what makes it so: where QEMU would not survive a job, a disk with an I/O thread."""


@dataclass(frozen=True)
class _View:
    """One round of one work: what it cost, the guest's writes meanwhile (milliseconds each), and the most of the host's
    disk that the scratch files or overlays had (bytes).
    """

    sample: Sample
    latencies: Sequence[float]
    per_write: int
    room: int

    @property
    def high(self) -> float:
        """The 99th percentile."""
        return sorted(self.latencies)[len(self.latencies) * 99 // 100]

    @property
    def throughput(self) -> float:
        """What the guest wrote, in MiB/s."""
        return len(self.latencies) * self.per_write / MIB / self.sample.wall


def rows(place: Place, rounds: int) -> Iterator[Figure]:
    """The figures, for a guest that writes 4 KiB every 2 ms and one that writes 256 KiB without a pause."""
    program = place.folder / "synced-writes"
    sources = Path(__file__).parent
    compiler = ["gcc", "-O2", "-static", "-o", str(program), str(sources / "synced-writes.c")]
    subprocess.run(compiler, check=True)
    linux = kernel.running(sources / "guest-init.sh", program, place.folder / "initramfs.gz")
    for kind in _PER_WRITE:
        guest = replace(linux, arguments=f"{linux.arguments} bench.writes={kind}")
        with ExitStack() as stack, closing(Folder(place)) as folder:
            works: dict[str, Callable[[], _View]] = {}
            for way, driver in _WAYS.items():
                disk = DiskSpec(target="vda", size=place.size, content=place.content(place.data), driver=driver)
                vm = stack.enter_context(place.live([disk], kernel=guest, memory_mib=192, iothreads=1 if driver else 0))
                vm.wait_for_console(f"(?m){_LINE}")
                for name, work in _works(place, vm, folder, f"{kind}-{len(works)}").items():
                    works[f"{name}, {way}"] = _seen(vm, work, kind, place.vms)
            views = interleaved(works, rounds)
        yield from _figures(f"a VM whose guest writes {kind}", views)


def _works(place: Place, vm: VM, folder: Folder, name: str) -> Mapping[str, Callable[[], Sample]]:
    vmkeep = Vmkeep(place, folder, name, 'mode = "INCREMENT"\nfs_freeze = "SUSPEND"')
    return {
        "no backup": lambda: run("sleep", str(_IDLE)),
        "full": lambda: vmkeep.backup(vm, "--reset"),
        "increment": lambda: vmkeep.backup(vm),
    }


def _seen(vm: VM, work: Callable[[], Sample], kind: str, vms: Path) -> Callable[[], _View]:
    """The guest prints a line for every 20 writes: those whose line came during the work count."""

    def view() -> _View:
        before = len(vm.console())
        with _Room([vm.folder, vms / "scratch"]) as room:
            sample = work()
        lines = re.findall(_LINE, vm.console()[before:], re.MULTILINE)
        latencies = [int(one) / 1000 for line in lines for one in line.split()]
        if not latencies:
            raise RuntimeError(f"the guest wrote nothing during {sample.commands}")
        return _View(sample, latencies, _PER_WRITE[kind], room.most)

    return view


class _Room:
    """Looks ten times a second how much of the disk the files of a backup have; `most` is what it saw at most."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.most = 0
        self._folders = folders
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> _Room:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(0.1):
            self.most = max(self.most, sum(_used(file) for folder in self._folders for file in folder.rglob("*")))


def _used(file: Path) -> int:
    if file.suffix != ".scratch" and ".backupcore-" not in file.name:
        return 0
    try:
        return file.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _figures(what: str, views: Mapping[str, Sequence[_View]]) -> Iterator[Figure]:
    for name, found in views.items():
        yield from costs(what, name, [one.sample for one in found])
        for measure, unit, figures in (
            ("latency, median", "ms", [statistics.median(one.latencies) for one in found]),
            ("latency, 99th percentile", "ms", [one.high for one in found]),
            ("latency, worst", "ms", [max(one.latencies) for one in found]),
            ("throughput", "MiB/s", [one.throughput for one in found]),
            ("room", "MiB", [one.room / MIB for one in found]),
        ):
            yield Figure(what=what, by=name, measure=measure, unit=unit, spread=Spread.of(figures))
