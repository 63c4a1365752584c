"""Keeps backups of virtual machines in a folder: a datastore driver for backupcore."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import backupcore
from backupcore.errors import IncrementImpossible, SourceNotFound
from backupcore.manifest import NAME as MANIFEST
from backupcore.model import Artifact, BackupRun, Listed, SourceRef, Stored, Usage, new_id

__all__ = ["Shelf"]

LABELS = ".labels"  # no artifact's name begins with a dot


@backupcore.driver
class Shelf:
    """One folder for each backup, its artifacts as plain files. The source is the folder's name."""

    path: Path = backupcore.option("the folder that holds the backups; it must exist")

    @backupcore.hookimpl
    def prebackup(self, run: BackupRun) -> None:
        """The folder is there, and so is every source that the run builds on."""
        os.scandir(self.path).close()
        for source in run.builds_on:
            if not self._complete(source):
                raise IncrementImpossible(f"source {source} is no longer in {self.path}")

    @backupcore.hookimpl
    def backup(self, artifacts: Sequence[Artifact], run: BackupRun, ctx: backupcore.Context) -> Stored:
        """Write everything to a hidden folder, and let it appear with one rename."""
        part, source = self._part(run), SourceRef(new_id())
        part.mkdir(mode=0o700)
        ctx.stack.callback(shutil.rmtree, part, ignore_errors=True)
        done = 0
        for artifact in artifacts:
            with artifact.open() as stream, (part / artifact.name).open("xb") as file:
                while block := stream.read(1 << 20):
                    file.write(block)
                    done += len(block)
                    ctx.progress.done(done)
            _sync(part / artifact.name)
        (part / LABELS).write_text(json.dumps(run.labels))
        _sync(part / LABELS)
        _sync(part)
        part.rename(self.path / source.token)
        _sync(self.path)
        return Stored(source=source, stored=done)

    @backupcore.hookimpl
    def postbackup(self, run: BackupRun) -> None:
        """What a run that was killed has left is no use to anybody."""
        shutil.rmtree(self._part(run), ignore_errors=True)

    @backupcore.hookimpl
    def restore(self, source: SourceRef) -> Sequence[Artifact]:
        """The files of the folder, which are opened when they are read."""
        if not self._complete(source):
            raise SourceNotFound(f"{self.path} holds no backup {source}")
        return [StoredFile(path) for path in (self.path / source.token).iterdir() if path.name != LABELS]

    @backupcore.hookimpl
    def delete(self, sources: Sequence[SourceRef]) -> bool:
        """The manifest first: from then on it is no backup any more, however this ends."""
        for source in sources:
            if self._complete(source):
                (self.path / source.token / MANIFEST).unlink()
                _sync(self.path / source.token)
                shutil.rmtree(self.path / source.token)
        return True

    @backupcore.hookimpl
    def sources(self) -> Iterator[Listed]:
        """Every folder with labels and a manifest."""
        for folder in self.path.iterdir():
            if not folder.name.startswith(".") and (folder / LABELS).is_file() and (folder / MANIFEST).is_file():
                yield Listed(source=SourceRef(folder.name), labels=json.loads((folder / LABELS).read_text()))

    @backupcore.hookimpl
    def check(self) -> bool:
        """The folder is there and can be written to."""
        os.scandir(self.path).close()
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise PermissionError(13, "cannot be written to", str(self.path))
        return True

    @backupcore.hookimpl
    def usage(self) -> Usage:
        """What the file system says."""
        room = os.statvfs(self.path)
        total, free = room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize
        return Usage(used=total - free, total=total, free=free)

    def _complete(self, source: SourceRef) -> bool:
        return (self.path / source.token / MANIFEST).is_file()

    def _part(self, run: BackupRun) -> Path:
        return self.path / f".{run.id}"


@dataclass(frozen=True)
class StoredFile(Artifact):
    """An artifact that lies in a file. It pickles as its path."""

    path: Path

    @property
    def name(self) -> str:  # type: ignore[override]  # read-only here
        """The file's name."""
        return self.path.name

    @property
    def size(self) -> int:  # type: ignore[override]  # read-only here
        """The file's size."""
        return self.path.stat().st_size

    def open(self) -> BinaryIO:
        """A stream from byte 0."""
        return self.path.open("rb")

    def read_at(self, offset: int, length: int) -> bytes:
        """A range of the file."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)


def _sync(path: Path) -> None:
    """Durable means that it survives a power cut: the contents of files, and the entries of folders."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
