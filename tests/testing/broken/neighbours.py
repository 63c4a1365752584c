"""Drivers that take away what others have made."""

from __future__ import annotations

import json
import shutil

import backupcore
from backupcore import hookimpl
from backupcore.model import BytesArtifact, SourceRef, Stored, new_id
from tests.testing.folder import Filled, Folder


@backupcore.driver
class OnePlace(Folder):
    """All its backups are made in the same folder."""

    @hookimpl
    def backup(self, artifacts, run, ctx):
        part, token = self.path / ".part", new_id()
        part.mkdir(exist_ok=True)
        for artifact in artifacts:
            Filled.keep(self, artifact, part)  # type: ignore[arg-type]  # it uses nothing of self
        (part / ".labels").write_text(json.dumps(run.labels))
        part.rename(self.path / token)
        return Stored(source=SourceRef(token))


@backupcore.driver
class Sweeping(Folder):
    """Takes every unfinished backup for one of its own that was killed."""

    @hookimpl
    def prebackup(self, run):
        for part in self.path.glob(".*"):
            shutil.rmtree(part)


@backupcore.driver
class ByHost(Folder):
    """Takes an unfinished backup of a host of the same name for one of its own that was killed."""

    @hookimpl
    def prebackup(self, run):
        for mark in self.path.glob(".*/host"):
            if mark.read_text() == run.host:
                shutil.rmtree(mark.parent)

    @hookimpl
    def backup(self, artifacts, run, ctx):
        part = self.path / f".{new_id()}"
        part.mkdir()
        (part / "host").write_text(run.host)
        for artifact in artifacts:
            with artifact.open() as source, (part / artifact.name).open("wb") as target:
                shutil.copyfileobj(source, target)
        (part / "host").unlink()
        (part / ".labels").write_text(json.dumps(run.labels))
        part.rename(self.path / part.name[1:])
        return Stored(source=SourceRef(part.name[1:]))


@backupcore.driver
class SameName(Folder):
    """Deletes by the VM's name, which another host uses as well."""

    @hookimpl
    def delete(self, sources):
        for source in sources:
            labels = self.path / source.token / ".labels"
            if labels.exists():
                for other in self.path.glob("[!.]*/.labels"):
                    shutil.rmtree(other.parent)
        return True


@backupcore.driver
class InPlace(Filled):
    """Flattens into the source of the last backup."""

    @hookimpl
    def flatten(self, merge, run, ctx):
        for artifact in merge.artifacts:
            Filled.keep(self, artifact, self.path / merge.sources[-1].token)
        return Stored(source=merge.sources[-1])


@backupcore.driver
class ByNumber(Filled):
    """Calls a backup by its image and number, which a flatten shares with the last backup that it merges."""

    def token(self, run, artifacts):
        return f"{run.image}-{run.number}"


@backupcore.driver
class Impatient(Filled):
    """Deletes what it merges before the result is there."""

    @hookimpl
    def flatten(self, merge, run, ctx):
        read = [BytesArtifact(one.name, one.read_at(0, one.size)) for one in merge.artifacts[1:]]
        for source in merge.sources:
            shutil.rmtree(self.path / source.token)
        read.insert(0, BytesArtifact(merge.artifacts[0].name, merge.artifacts[0].read_at(0, merge.artifacts[0].size)))
        return Filled.backup(self, read, run, ctx)


@backupcore.driver
class PointIsMine(Folder):
    """Cleans up after a backup that failed by its point, which a flatten shares with the last backup that it merges."""

    @hookimpl
    def backup(self, artifacts, run, ctx):
        try:
            return Folder.backup(self, artifacts, run, ctx)
        except BaseException:
            for labels in self.path.glob("[!.]*/.labels"):
                if json.loads(labels.read_text())["point"] == run.point:
                    shutil.rmtree(labels.parent)
            raise
