"""One command as a whole: wall and processor seconds of its process tree, peak memory, bytes written to disks."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Sample", "Spread", "compared", "interleaved", "run", "together"]

_SECTOR = 512  # bytes; the unit of /proc/diskstats, whatever the device's own sector is


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Seconds, and bytes. `processor` is that of the command and of all that it waited for; QEMU's is not in it."""

    wall: float
    processor: float
    memory: int
    written: int
    output: str = ""


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some figures, the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Spread:
        """Of at least one figure."""
        return cls(statistics.median(figures), min(figures), max(figures))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def run(*command: str | Path, environment: Mapping[str, str] | None = None) -> Sample:
    """Run a command to its end. RuntimeError, with what it said, if it fails."""
    os.sync()
    written = _written()
    started = time.monotonic()
    process = subprocess.Popen(
        [str(part) for part in command],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)  # it tells what the whole tree used, which Popen.wait does not
    wall = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {process.returncode}")
    os.sync()
    return Sample(
        wall=wall,
        processor=usage.ru_utime + usage.ru_stime,
        memory=usage.ru_maxrss << 10,
        written=_written() - written,
        output=output,
    )


def together(*samples: Sample) -> Sample:
    """Several commands that make up one work, one after the other."""
    return Sample(
        wall=sum(sample.wall for sample in samples),
        processor=sum(sample.processor for sample in samples),
        memory=max(sample.memory for sample in samples),
        written=sum(sample.written for sample in samples),
        output=samples[-1].output,
    )


def interleaved(works: Mapping[str, Callable[[], Sample]], rounds: int) -> dict[str, list[Sample]]:
    """Every work once per round, in turn, so that whatever else the machine does falls on all of them."""
    taken: dict[str, list[Sample]] = {name: [] for name in works}
    for number in range(rounds):
        names = list(works) if number % 2 == 0 else list(works)[::-1]
        for name in names:
            taken[name].append(works[name]())
    return taken


def compared(what: str, works: Mapping[str, Callable[[], Sample]], rounds: int) -> Iterator[str]:
    """The lines for several works, and for how the first compares with each of the others, round by round."""
    taken = interleaved(works, rounds)
    for name, samples in taken.items():
        yield (
            f"{what}, {name}: {Spread.of([one.wall for one in samples])} s wall, "
            f"{Spread.of([one.processor for one in samples])} s processor, "
            f"{max(one.memory for one in samples) >> 20} MiB of memory, "
            f"{Spread.of([one.written / (1 << 20) for one in samples])} MiB written"
        )
    first, *others = taken
    for other in others:
        ratios = [ours.wall / theirs.wall for ours, theirs in zip(taken[first], taken[other], strict=True)]
        yield f"{what}, {first} to {other}: {Spread.of(ratios)}"


def _written() -> int:
    """Bytes written to whole disks since the machine started."""
    disks = {entry.name for entry in Path("/sys/block").iterdir() if not entry.name.startswith(("loop", "ram", "dm-"))}
    rows = (line.split() for line in Path("/proc/diskstats").read_text().splitlines())
    return sum(int(row[9]) for row in rows if row[2] in disks) * _SECTOR
