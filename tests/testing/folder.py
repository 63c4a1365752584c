"""A directory driver that keeps the contract: what the broken drivers of the tests are made from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import backupcore
from backupcore import hookimpl
from backupcore.context import Context
from backupcore.errors import IncrementImpossible, SourceNotFound, TargetUnavailable
from backupcore.manifest import NAME
from backupcore.model import Artifact, BackupRun, Listed, SourceRef, Stored, Usage, new_id

ZEROS = bytes(1 << 20)


@dataclass(frozen=True)
class StoredFile(Artifact):
    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def open(self) -> BinaryIO:
        return self.path.open("rb")

    def read_at(self, offset: int, length: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)


@backupcore.driver
class Folder:
    path: Path = backupcore.option("the folder that holds the backups")
    limit: int = backupcore.option("nothing", default=0)
    password_file: Path | None = backupcore.option("nothing is read from it", default=None)
    url: str = backupcore.option("may hold a password", default="", secret=True)

    @hookimpl
    def prebackup(self, run: BackupRun) -> None:
        self._there()
        for source in run.builds_on:
            if not (self.path / source.token).is_dir():
                raise IncrementImpossible(f"source {source} is gone")

    @hookimpl
    def backup(self, artifacts: Sequence[Artifact], run: BackupRun, ctx: Context) -> Stored:
        token = new_id()
        part = self.path / f".{token}"
        part.mkdir()
        try:
            for artifact in artifacts:
                write(artifact, part / artifact.name)
            (part / ".labels").write_text(json.dumps(run.labels))
            part.rename(self.path / token)
        except BaseException:
            shutil.rmtree(part)
            raise
        return Stored(source=SourceRef(token))

    @hookimpl
    def restore(self, source: SourceRef, ctx: Context) -> Sequence[Artifact]:
        folder = self.path / source.token
        if not (folder / NAME).is_file():
            raise SourceNotFound(f"no source {source}")
        return [StoredFile(path) for path in folder.glob("[!.]*")]

    @hookimpl
    def delete(self, sources: Sequence[SourceRef]) -> bool:
        for source in sources:
            (self.path / source.token / NAME).unlink(missing_ok=True)
            shutil.rmtree(self.path / source.token, ignore_errors=True)
        return True

    @hookimpl
    def sources(self) -> Iterable[Listed]:
        self._there()
        for labels in self.path.glob("[!.]*/.labels"):
            if not (labels.parent / NAME).exists():
                continue
            yield Listed(source=SourceRef(labels.parent.name), labels=json.loads(labels.read_text()))

    @hookimpl
    def usage(self) -> Usage:
        room = os.statvfs(self.path)
        return Usage(used=1, total=room.f_blocks * room.f_frsize, free=room.f_bavail * room.f_frsize)

    def _there(self) -> None:
        if not self.path.is_dir():
            raise TargetUnavailable(f"{self.path} is away")


@backupcore.driver
class Filled(Folder):
    """A folder whose `backup` is made of parts that a subclass can replace."""

    def token(self, run: Any, artifacts: Any) -> str:
        return new_id()

    def keep(self, artifact: Artifact, folder: Path) -> None:
        write(artifact, folder / artifact.name)

    def labels(self, run: Any) -> dict[str, str]:
        return run.labels

    @hookimpl
    def backup(self, artifacts, run, ctx):
        token = self.token(run, artifacts)
        part = self.path / f".{token}.{new_id()}"
        part.mkdir()
        try:
            for artifact in artifacts:
                self.keep(artifact, part)
            (part / ".labels").write_text(json.dumps(self.labels(run)))
            shutil.rmtree(self.path / token, ignore_errors=True)
            part.rename(self.path / token)
        except BaseException:
            shutil.rmtree(part)
            raise
        return Stored(source=SourceRef(token))


def write(artifact: Artifact, path: Path) -> None:
    """Zeros become holes: a disk beyond 4 GiB takes next to no room then."""
    with artifact.open() as source, path.open("wb") as target:
        while block := source.read(len(ZEROS)):
            if block == ZEROS:
                target.seek(len(block), os.SEEK_CUR)
            else:
                target.write(block)
        target.truncate()


def tamper(path: Path):
    def change(source: SourceRef, artifact: str) -> None:
        file = path / source.token / artifact
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    return change
