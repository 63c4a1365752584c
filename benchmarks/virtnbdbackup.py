"""virtnbdbackup and virtnbdrestore. It refuses a VM that has checkpoints of others, so it has VMs of its own.

It neither syncs what it writes nor keeps digests of it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks.measure import Sample, run, while_reading
from benchmarks.place import Place
from benchmarks.vmkeep import fresh
from lab.vm import VM

__all__ = ["Virtnbdbackup"]


class Virtnbdbackup:
    """Backups of one VM in a folder; "full" takes its own checkpoints with it."""

    def __init__(self, place: Place, vm: VM) -> None:
        self._place = place
        self._vm = vm
        self.folder = place.folder / f"virtnbdbackup-{vm.name}"

    def command(self, level: str) -> list[str | Path]:
        """The command line for a backup: "full", "inc", or "copy", which leaves no checkpoint."""
        return [
            *("virtnbdbackup", "--noprogress", "-U", self._place.uri, "-d", self._vm.name, "-l", level),
            *("-S", self._vm.folder, "-o", self.folder),
        ]

    def backup(self, level: str) -> Sample:
        """One backup; a full or a copy begins with an empty folder."""
        if level != "inc":
            self.forget()
        return while_reading([self._vm.name], lambda: run(*self.command(level)))

    def restore(self) -> Sample:
        """Restore all that is in the folder, to a folder that is gone afterwards."""
        with fresh(self._place.folder / "virtnbdrestored") as folder:
            log = self._place.folder / "virtnbdrestore.log"
            return run("virtnbdrestore", "--noprogress", "-L", log, "-i", self.folder, "-o", folder)

    def forget(self) -> None:
        """Remove its backups."""
        shutil.rmtree(self.folder, ignore_errors=True)
