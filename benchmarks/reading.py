"""Reading a live VM's disk to nowhere beside nbdcopy: the artifact as a stream, and by a reader that takes digests."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from benchmarks.figures import Figure, Spread
from benchmarks.measure import Sample, costs, interleaved, ratio, run
from benchmarks.place import Place
from benchmarks.served import served

__all__ = ["rows"]


def rows(place: Place, rounds: int) -> Iterator[Figure]:
    """The figures."""
    socket = place.vms / "read.sock"
    with served(place.filled.disk("vda"), "qcow2", socket) as uri:
        stream = (sys.executable, "-m", "benchmarks.stream", socket, "vda")
        sums = place.folder / "sums"

        def hashed() -> Sample:
            sums.unlink(missing_ok=True)
            return run(*stream, sums)

        taken = interleaved(
            {
                "nbdcopy": lambda: run("nbdcopy", uri, "null:"),
                "artifact": lambda: run(*stream),
                "artifact with digests": hashed,
            },
            rounds,
        )
    what = "read a disk to nowhere"
    for name, samples in taken.items():
        yield from costs(what, name, samples)
    yield from ratio(what, "artifact", "nbdcopy", taken, 1.0)
    yield from ratio(what, "artifact with digests", "nbdcopy", taken, 1.3)
    for name in ("artifact", "artifact with digests"):
        started = [float(ours.output) / theirs.wall for ours, theirs in zip(taken[name], taken["nbdcopy"], strict=True)]
        yield Figure(
            what=what,
            by=f"{name}, less Python's start : nbdcopy",
            measure="wall ratio",
            unit="",
            spread=Spread.of(started),
        )
