"""Increments of a live VM to restic: what vmkeep takes beyond what restic needs for that data."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.measure import Sample, Spread, interleaved, run
from benchmarks.vm import MIB, Place

__all__ = ["rows"]

DIRTY = 20
"""MiB that change between two increments: 1 % of the data."""


def rows(place: Place, rounds: int) -> Iterator[str]:
    """The lines of the table."""
    program = Path(sys.executable).with_name("vmkeep")
    repository, beside = place.folder / "increments", place.folder / "beside"
    config = place.configuration(
        "increments", f'driver = "restic"\nrepository = "{repository}"\npassword_file = "{place.password}"'
    )
    environment = {"RESTIC_PASSWORD_FILE": str(place.password), "RESTIC_REPOSITORY": str(beside)}
    run(program, "--config", config, "--json", "backup", place.vm.name)
    run("restic", "init", "-q", environment=environment)
    ready = place.folder / "dirty"

    def restic() -> Sample:
        ready.write_bytes(os.urandom(DIRTY * MIB))
        return run("restic", "backup", "--force", "-q", ready, environment=environment)

    def ours(writes: Callable[[], list[str]]) -> Callable[[], Sample]:
        def work() -> Sample:
            place.vm.io("vda", *writes())
            return run(program, "--config", config, "--json", "backup", place.vm.name)

        return work

    taken = interleaved(
        {
            "nothing dirty": ours(list),
            "1 % in one place": ours(_one),
            "1 % in islands": ours(lambda: _islands(place.size)),
            "restic": restic,
        },
        rounds,
    )
    for name, samples in taken.items():
        yield f"increment, {name}: {Spread.of([one.wall for one in samples])} s"
        if name == "restic":
            continue
        beyond = [mine.wall - theirs.wall for mine, theirs in zip(samples, taken["restic"], strict=True)]
        read = max(int(json.loads(one.output)["read"]) for one in samples)
        yield f"increment, {name}: {Spread.of(beyond)} s beyond what restic takes for {DIRTY} MiB"
        yield f"increment, {name}: at most {read / MIB:.1f} MiB read from the disk"
    for folder in (repository, beside):
        shutil.rmtree(folder)


def _one() -> list[str]:
    return [f"write -P {os.urandom(1)[0]} 100M {DIRTY}M"]


def _islands(size: int) -> list[str]:
    pattern, count = os.urandom(1)[0], DIRTY * 16
    step = size // count // (64 << 10) * 64  # KiB
    return [f"write -P {pattern} {number * step}k 64k" for number in range(count)]
