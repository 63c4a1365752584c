"""Our side: the vmkeep command with one datastore, each call a process of its own."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.measure import Sample, run, while_reading
from benchmarks.place import Place
from benchmarks.stores import Store
from lab.vm import VM

__all__ = ["PROGRAM", "Taken", "Vmkeep"]

PROGRAM = Path(sys.executable).with_name("vmkeep")


@dataclass(frozen=True, slots=True)
class Taken:
    """A backup that was taken: its image's number and its source."""

    image: int
    source: str


class Vmkeep:
    """vmkeep with a configuration of its own, named `name`, for one store; `taken` are its backups, oldest first."""

    def __init__(self, place: Place, store: Store, name: str = "vmkeep", defaults: str = "") -> None:
        self._place = place
        self.state = place.state(name)
        self.config = place.configuration(name, store.table, defaults)
        self.taken: list[Taken] = []

    def command(self, *arguments: str | Path) -> list[str | Path]:
        """The command line."""
        return [PROGRAM, "--config", self.config, "--json", *arguments]

    def ask(self, *arguments: str | Path) -> Sample:
        """Run it; its answer is the sample's output."""
        return run(*self.command(*arguments))

    def backup(self, vm: VM, *options: str) -> Sample:
        """Back a VM up. What was read of its disks is what QEMU says, as it is for every other tool."""
        taken = while_reading([vm.name], lambda: self.ask("backup", vm.name, *options))
        told = told_by(taken)
        self.taken.append(Taken(told["image"], told["source"]))
        return replace(taken, frozen=float(told["frozen_seconds"]))

    def delete(self) -> None:
        """Delete what was backed up so far, unmeasured: its room on the disk and in the page cache is free again."""
        for taken in self.taken:
            self.ask("image", "delete", str(taken.image), "--yes")
        self.taken.clear()

    def restore(self, *options: str, image: int | None = None) -> Sample:
        """Restore (by default the last backup) to a folder that is gone afterwards."""
        with fresh(self._place.folder / "restored") as folder:
            return self.ask("restore", str(image or self.taken[-1].image), "--to", folder, *options)

    def flatten(self, *options: str) -> Sample:
        """Flatten the image of the last backup."""
        return self.ask("image", "flatten", str(self.taken[-1].image), *options)


def told_by(sample: Sample) -> dict[str, Any]:
    """The document that a command printed."""
    document: dict[str, Any] = json.loads(sample.output)
    return document


@contextmanager
def fresh(folder: Path) -> Iterator[Path]:
    """A new folder, which is gone after the block."""
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
