"""What a driver leaves on this host: nothing."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backupcore.errors import BackupError
from backupcore.model import Artifact
from backupcore.testing import processes
from backupcore.testing.bench import MIB, Bench, Failed
from backupcore.testing.given import Failing, Made
from backupcore.testing.life import digest

_ROUNDS = 4
_SETTLE = 3.0  # seconds in which what is being closed may close
_SHARED = ("/tmp", "/var/tmp", "/dev/shm", ".")  # noqa: S108 - looked at, not written to


def litter(bench: Bench) -> None:
    """After backups, a failed one, restores and deletes no file is left in the folders for temporary files."""
    seed = int.from_bytes(os.urandom(6), "big")
    disk = Made("disk.vda.qcow2", MIB + 7, seed)
    artifacts: list[Artifact] = [disk, *bench.all_kinds()[1:]]
    before = {folder: _names(folder) for folder in _SHARED}
    with _temporary_files_in(bench.place()) as place:
        kept = bench.keep(artifacts)
        bench.same(kept)
        with bench.refused(BackupError, what="a read that fails"):
            bench.keep([Failing(disk, disk.size // 2), *artifacts[1:]])
        with bench.context() as ctx:
            bench.open().delete([kept.source], ctx)
        gc.collect()
        left = sorted(str(path.relative_to(place)) for path in place.rglob("*"))
    if left:
        raise Failed(f"files are left in the folder for temporary files: {', '.join(left)[:200]}")
    mark = disk.read_at(0, 64)
    for folder, names in before.items():
        for name in _names(folder) - names:
            if _holds(Path(folder, name), mark):
                raise Failed(f"a file with what was to be kept is left: {Path(folder, name)}")


@contextmanager
def _temporary_files_in(place: Path) -> Iterator[Path]:
    """Python's modules and children put them there while the block runs."""
    variables = ("TMPDIR", "TMP", "TEMP")
    before = {name: os.environ.get(name) for name in variables}
    known, tempfile.tempdir = tempfile.tempdir, str(place)
    os.environ.update(dict.fromkeys(variables, str(place)))
    try:
        yield place
    finally:
        tempfile.tempdir = known
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _names(folder: str) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)}
    except OSError:
        return set()


def _holds(path: Path, mark: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return mark in file.read(4 * MIB)
    except OSError:  # it is gone, or another user's
        return False


def leaks(bench: Bench) -> None:
    """Backups, restores and deletes leave no thread running and no file or connection open."""
    for _ in range(2):  # what is made once and stays is no leak
        _round(bench)
    before = _held()
    for _ in range(_ROUNDS):
        _round(bench)

    def grown() -> dict[str, int]:
        gc.collect()
        return {what: count - before[what] for what, count in _held().items() if count - before[what] >= _ROUNDS}

    if not processes.wait_for(lambda: not grown(), _SETTLE):
        more = ", ".join(f"{count} more {what}" for what, count in grown().items())
        if more:
            raise Failed(f"after {_ROUNDS} backups, restores and deletes there are {more}")


def _round(bench: Bench) -> None:
    kept = bench.keep()
    with bench.context() as ctx:
        store = bench.open()
        for artifact in store.artifacts(kept.source, ctx).values():
            digest(artifact)
            with artifact.open() as early:
                early.read(1)
        store.sources(ctx)
        store.delete([kept.source], ctx)


def _held() -> dict[str, int]:
    return {"threads": len([*Path("/proc/self/task").iterdir()]), "open files": len([*Path("/proc/self/fd").iterdir()])}
