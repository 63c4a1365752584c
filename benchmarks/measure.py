"""One command as a whole: wall and processor seconds of its process tree, peak memory, bytes read and written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from benchmarks.figures import MIB, Figure, Spread
from benchmarks.tree import Watch

__all__ = ["COSTS", "Sample", "compared", "costs", "interleaved", "ratio", "run", "together", "while_reading"]

T = TypeVar("T")

_SECTOR = 512  # bytes; the unit of /proc/diskstats, whatever the device's own sector is


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Seconds and bytes of one work, by whatever commands.

    `processor` is that of the commands and of all that they waited for. `memory` is the most that the tree had
    resident at once (see `benchmarks.tree`), `descriptors` the most that one process had open. `written` is what went
    to the host's disks meanwhile, by anybody; `inward` and `outward` what the tree read and wrote by system calls,
    pipes and views included, sockets not. `read` is what was read of the VM's disks, `frozen` how long the guest stood
    still; None where nobody says.
    """

    wall: float
    processor: float
    memory: int
    written: int
    inward: int = 0
    outward: int = 0
    descriptors: int = 0
    read: int | None = None
    frozen: float | None = None
    output: str = ""
    commands: tuple[str, ...] = ()


COSTS: dict[str, tuple[str, Callable[[Sample], float | None]]] = {
    "wall": ("s", lambda one: one.wall),
    "processor": ("s", lambda one: one.processor),
    "memory": ("MiB", lambda one: one.memory / MIB),
    "read": ("MiB", lambda one: None if one.read is None else one.read / MIB),
    "written": ("MiB", lambda one: one.written / MIB),
    "frozen": ("s", lambda one: one.frozen),
}
"""What every work costs: the unit, and how it is found in a sample."""


def run(
    *command: str | Path,
    environment: Mapping[str, str] | None = None,
    output: Path | None = None,
) -> Sample:
    """Run a command to its end; with `output`, what it prints goes to that file. RuntimeError, with its last words,
    if it fails.
    """
    os.sync()
    written = _written()
    line = [str(part) for part in command]
    with tempfile.TemporaryFile() as said, (output or Path(os.devnull)).open("wb") as file:
        started = time.monotonic()
        process = subprocess.Popen(
            line, env={**os.environ, **(environment or {})}, stdout=file if output else subprocess.PIPE, stderr=said
        )
        with Watch(process.pid) as watch:
            told = process.stdout.read() if process.stdout is not None else b""
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, but still there to be asked
            wall = time.monotonic() - started
        inward, outward = _calls(process.pid)
        _, status, usage = os.wait4(process.pid, 0)  # it tells what the whole tree used, which Popen.wait does not
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.stdout is not None:
            process.stdout.close()
        if process.returncode:
            said.seek(0)
            last = said.read()[-2000:].decode(errors="replace").strip()
            raise RuntimeError(f"{shlex.join(line)} ended with {process.returncode}: {last}")
    os.sync()
    return Sample(
        wall=wall,
        processor=usage.ru_utime + usage.ru_stime,
        memory=watch.memory,  # ru_maxrss is of the largest process alone, and never less than ours at the fork
        descriptors=watch.descriptors,
        written=_written() - written,
        inward=inward,
        outward=outward,
        output=told.decode(errors="replace"),
        commands=(shlex.join(line) + (f" > {output}" if output else ""),),
    )


def together(*samples: Sample) -> Sample:
    """Several commands that make up one work, one after the other."""
    reads = [sample.read for sample in samples if sample.read is not None]
    return Sample(
        wall=sum(sample.wall for sample in samples),
        processor=sum(sample.processor for sample in samples),
        memory=max(sample.memory for sample in samples),
        descriptors=max(sample.descriptors for sample in samples),
        written=sum(sample.written for sample in samples),
        inward=sum(sample.inward for sample in samples),
        outward=sum(sample.outward for sample in samples),
        read=sum(reads) if reads else None,
        output=samples[-1].output,
        commands=tuple(command for sample in samples for command in sample.commands),
    )


def while_reading(vms: Sequence[str], work: Callable[[], Sample]) -> Sample:
    """The sample of a work, with what the QEMUs of these VMs (their names) read from files meanwhile.

    QEMU's own count (rchar of /proc/PID/io) is the same for whoever is its NBD client; reads from sockets are not in
    it. The VMs' guests must stand still, or what they read counts as well.
    """
    processes = [_qemu(name) for name in vms]
    before = sum(_calls(one)[0] for one in processes)
    sample = work()
    return replace(sample, read=sum(_calls(one)[0] for one in processes) - before)


def interleaved(works: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Every work once per round, in turn, so that whatever else the machine does falls on all of them."""
    taken: dict[str, list[T]] = {name: [] for name in works}
    for number in range(rounds):
        names = list(works) if number % 2 == 0 else list(works)[::-1]
        for name in names:
            taken[name].append(works[name]())
    return taken


def compared(
    what: str,
    works: Mapping[str, Callable[[], Sample]],
    rounds: int,
    at_most: Mapping[str, float] | None = None,
) -> Iterator[Figure]:
    """What several works cost, and how the first compares with each of the others, round by round.

    `at_most` are the targets: the other's name, and the ratio of wall seconds.
    """
    taken = interleaved(works, rounds)
    for name, samples in taken.items():
        yield from costs(what, name, samples)
    first, *others = taken
    for other in others:
        yield from ratio(what, first, other, taken, (at_most or {}).get(other))


def costs(what: str, by: str, samples: Sequence[Sample], at_most: float | None = None) -> Iterator[Figure]:
    """What one work costs, `at_most` so many wall seconds; a cost that nobody knows is left out."""
    for measure, (unit, found) in COSTS.items():
        figures = [figure for figure in map(found, samples) if figure is not None]
        if figures:
            first = measure == "wall"
            yield Figure(
                what=what,
                by=by,
                measure=measure,
                unit=unit,
                spread=Spread.of(figures),
                at_most=at_most if first else None,
                commands=samples[-1].commands if first else (),
            )


def ratio(
    what: str, ours: str, theirs: str, taken: Mapping[str, Sequence[Sample]], at_most: float | None = None
) -> Iterator[Figure]:
    """How two works compare, in wall and in processor seconds: the spread of the rounds' ratios."""
    pairs = list(zip(taken[ours], taken[theirs], strict=True))
    by = f"{ours} : {theirs}"
    walls = Spread.of([one.wall / other.wall for one, other in pairs])
    yield Figure(what=what, by=by, measure="wall ratio", unit="", spread=walls, at_most=at_most)
    # The kernel counts in ticks of 10 ms, so a command that does nothing may have taken no time.
    processors = Spread.of([one.processor / max(other.processor, 0.01) for one, other in pairs])
    yield Figure(what=what, by=by, measure="processor ratio", unit="", spread=processors)


def _written() -> int:
    """Bytes written to whole disks since the machine started."""
    disks = {entry.name for entry in Path("/sys/block").iterdir() if not entry.name.startswith(("loop", "ram", "dm-"))}
    rows = (line.split() for line in Path("/proc/diskstats").read_text().splitlines())
    return sum(int(row[9]) for row in rows if row[2] in disks) * _SECTOR


def _calls(process: int) -> tuple[int, int]:
    """Bytes that a process, and those that have ended and that it waited for, read and wrote by system calls."""
    told = dict(re.findall(r"^([rw]char): (\d+)$", Path(f"/proc/{process}/io").read_text(), re.MULTILINE))
    return int(told["rchar"]), int(told["wchar"])


def _qemu(name: str) -> int:
    """The process of a running VM."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue  # it ended while we looked
        if f"\0guest={name},".encode() in command:
            return int(path.parent.name)
    raise RuntimeError(f"VM {name} does not run")
