"""A live full to a new local restic repository, beside restic on the ready file, and by way of a staging file."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Sample, compared, run, together
from benchmarks.vm import Place

__all__ = ["rows"]


def rows(place: Place, rounds: int) -> Iterator[str]:
    """The lines of the table."""
    works = _Works(place)
    yield from compared(
        "full to a new restic repository",
        {"vmkeep": works.ours, "restic": works.restic, "staging": works.staging},
        rounds,
    )


class _Works:
    def __init__(self, place: Place) -> None:
        self._place = place
        self._program = Path(sys.executable).with_name("vmkeep")
        self._repository = place.folder / "repository"
        self._environment = {"RESTIC_PASSWORD_FILE": str(place.password), "RESTIC_REPOSITORY": str(self._repository)}
        self._config = place.configuration(
            "restic",
            f'driver = "restic"\nrepository = "{self._repository}"\npassword_file = "{place.password}"',
        )
        self._ready = place.folder / "ready.qcow2"
        place.ready(self._ready)

    def _clean(self) -> None:
        shutil.rmtree(self._repository, ignore_errors=True)

    def ours(self) -> Sample:
        """The whole command, in full mode's first run."""
        self._clean()
        return run(self._program, "--config", self._config, "--json", "backup", "--reset", self._place.vm.name)

    def restic(self) -> Sample:
        """What restic alone needs, with the file ready in the page cache."""
        self._clean()
        return together(
            run("restic", "init", "-q", environment=self._environment),
            run("restic", "backup", "--force", "-q", self._ready, environment=self._environment),
        )

    def staging(self) -> Sample:
        """Convert to a file, then restic: the usual way."""
        self._clean()
        staged = self._place.folder / "staged.qcow2"
        samples = (
            self._place.ready(staged),
            run("restic", "init", "-q", environment=self._environment),
            run("restic", "backup", "--force", "-q", staged, environment=self._environment),
        )
        staged.unlink()
        return together(*samples)
