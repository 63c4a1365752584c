"""A datastore driver for tests that are not about datastores: plain files in a folder, quick, with nothing in between.

It is found by its entry point like any other (`installed` writes one), under the name ``lab``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import backupcore
from backupcore import hookimpl
from backupcore.context import Context
from backupcore.errors import IncrementImpossible, SourceNotFound
from backupcore.manifest import NAME
from backupcore.model import Artifact, BackupRun, Listed, Outcome, Prepared, SourceRef, Stored, new_id


def installed(folder: Path) -> str:
    """Make a folder that, on Python's path, brings the driver ``lab``; returns it."""
    info = folder / "lab_store-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab-store\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[backupcore.drivers]\nlab = lab.store:Folder\n")
    return str(folder)


@dataclass(frozen=True)
class _File(Artifact):
    path: Path
    seekable = True

    @property
    def name(self) -> str:  # type: ignore[override]  # the path decides it
        return self.path.name

    @property
    def size(self) -> int:  # type: ignore[override]  # the file decides it
        return self.path.stat().st_size

    def open(self) -> BinaryIO:
        return self.path.open("rb")

    def read_at(self, offset: int, length: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)


@backupcore.driver
class Folder:
    """``path/SOURCE/``; an unfinished upload is ``path/.HOST.VM.RUN.part/``."""

    path: Path = backupcore.option("where the backups lie")

    @hookimpl
    def prebackup(self, run: BackupRun) -> Prepared | None:
        self.path.mkdir(parents=True, exist_ok=True)
        for source in run.builds_on:
            if not (self.path / source.token).is_dir():
                raise IncrementImpossible(f"source {source} is gone")
        return None

    @hookimpl
    def backup(self, artifacts: Sequence[Artifact], run: BackupRun, ctx: Context) -> Stored:
        part = self.path / f".{run.installation}.{run.vm.uuid}.{run.id}.part"
        part.mkdir()
        size = 0
        for artifact in artifacts:
            with artifact.open() as source, (part / artifact.name).open("wb") as target:
                while block := source.read(1 << 20):
                    ctx.check()
                    target.write(block)
                size += target.tell()
        (part / ".labels").write_text(json.dumps(run.labels))
        source_ref = SourceRef(new_id())
        part.rename(self.path / source_ref.token)
        return Stored(source=source_ref, stored=size)

    @hookimpl
    def postbackup(self, run: BackupRun, outcome: Outcome, ctx: Context) -> None:
        # Of this VM and host no other run lives; an earlier one may have lost sight of the folder.
        for part in self.path.glob(f".{run.installation}.{run.vm.uuid}.*.part"):
            shutil.rmtree(part)
            ctx.did(f"removed an unfinished upload from {self.path}")

    @hookimpl
    def restore(self, source: SourceRef) -> Sequence[Artifact]:
        if not (self.path / source.token / NAME).exists():
            raise SourceNotFound(f"no source {source}")
        return [_File(file) for file in (self.path / source.token).iterdir() if file.name != ".labels"]

    @hookimpl
    def delete(self, sources: Sequence[SourceRef]) -> bool:
        for source in sources:
            shutil.rmtree(self.path / source.token, ignore_errors=True)
        return True

    @hookimpl
    def sources(self) -> Iterable[Listed]:
        for labels in self.path.glob("[!.]*/.labels"):
            yield Listed(source=SourceRef(labels.parent.name), labels=json.loads(labels.read_text()))

    @hookimpl
    def check(self) -> bool:
        return True

    @hookimpl
    def identity(self, make: bool) -> str | None:
        marker = self.path / ".identity"
        if make and not marker.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError), marker.open("x") as file:
                file.write(new_id())
        return marker.read_text() if marker.exists() else None
