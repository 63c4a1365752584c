"""A live full to a local folder by rsync and its restore, beside rsync of the ready file."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Sample, compared, run
from benchmarks.vm import Place

__all__ = ["rows"]


def rows(place: Place, rounds: int) -> Iterator[str]:
    """The lines of the table."""
    program = Path(sys.executable).with_name("vmkeep")
    target, ready, copy, restored = (place.folder / name for name in ("target", "ready.qcow2", "copy", "restored"))
    target.mkdir()
    config = place.configuration("rsync", f'driver = "rsync"\ntarget = "{target}"')
    images: list[tuple[int, str]] = []

    def ours() -> Sample:
        taken = run(program, "--config", config, "--json", "backup", "--reset", place.vm.name)
        told = json.loads(taken.output)
        images.append((told["image"], told["source"]))
        return taken

    def rsync(file: Path) -> Sample:
        try:
            return run("rsync", "--whole-file", "--fsync", file, copy)
        finally:
            copy.unlink(missing_ok=True)

    def back() -> Sample:
        restored.mkdir()
        try:
            return run(program, "--config", config, "--json", "restore", str(images[0][0]), "--to", restored)
        finally:
            shutil.rmtree(restored)

    place.ready(ready)
    yield from compared("full to a folder by rsync", {"vmkeep": ours, "rsync": lambda: rsync(ready)}, rounds)
    kept = target / images[0][1].replace(".", "/") / "disk.vda.qcow2"
    yield from compared("restore from a folder", {"vmkeep": back, "rsync": lambda: rsync(kept)}, rounds)
    shutil.rmtree(target)
    ready.unlink()
