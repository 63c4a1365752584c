"""Drivers that list what is no backup, or not what is one, or do not delete it."""

from __future__ import annotations

import json
import shutil
import time

import backupcore
from backupcore import hookimpl
from backupcore.manifest import NAME
from backupcore.model import BytesArtifact, Listed, SourceRef, Stored, new_id
from tests.testing.folder import Filled, Folder, write


@backupcore.driver
class NoEmptyLabels(Filled):
    def labels(self, run):
        return {key: value for key, value in run.labels.items() if value}


@backupcore.driver
class TwiceListed(Folder):
    @hookimpl
    def sources(self):
        found = list(Folder.sources(self))
        return [*found, *found]


class Lax(Folder):
    """Lists what has labels, whether it has a manifest or not."""

    @hookimpl
    def sources(self):
        self._there()
        for labels in self.path.glob("[!.]*/.labels"):
            yield Listed(source=SourceRef(labels.parent.name), labels=json.loads(labels.read_text()))


@backupcore.driver
class Eager(Lax):
    """Publishes first and fills in later."""

    @hookimpl
    def backup(self, artifacts, run, ctx):
        token = new_id()
        folder = self.path / token
        folder.mkdir()
        try:
            (folder / ".labels").write_text(json.dumps(run.labels))
            for artifact in artifacts:
                Filled.keep(self, artifact, folder)  # type: ignore[arg-type]  # it uses nothing of self
        except BaseException:
            shutil.rmtree(folder)
            raise
        return Stored(source=SourceRef(token))


@backupcore.driver
class Late(Lax):
    """Publishes before the manifest is written."""

    @hookimpl
    def backup(self, artifacts, run, ctx):
        read = {one.name: one.read_at(0, one.size) for one in artifacts}
        token = new_id()
        folder = self.path / token
        folder.mkdir()
        (folder / ".labels").write_text(json.dumps(run.labels))
        for name in sorted(read):
            if name == NAME:
                time.sleep(5)
            (folder / name).write_bytes(read[name])
        return Stored(source=SourceRef(token))


@backupcore.driver
class ByName(Folder):
    """Takes the names in order, and calls a backup complete once it has its manifest."""

    @hookimpl
    def backup(self, artifacts, run, ctx):
        folder = self.path / new_id()
        folder.mkdir()
        try:
            (folder / ".labels").write_text(json.dumps(run.labels))
            for artifact in sorted(artifacts, key=lambda one: one.name):
                write(artifact, folder / f".{artifact.name}")
                (folder / f".{artifact.name}").rename(folder / artifact.name)
        except BaseException:
            shutil.rmtree(folder)
            raise
        return Stored(source=SourceRef(folder.name))


@backupcore.driver
class FirstOnly(Folder):
    @hookimpl
    def delete(self, sources):
        return Folder.delete(self, sources[:1])


@backupcore.driver
class Strict(Folder):
    @hookimpl
    def delete(self, sources):
        for source in sources:
            shutil.rmtree(self.path / source.token)
        return True


@backupcore.driver
class Caching(Folder):
    """Gives back what it remembers."""

    @hookimpl
    def restore(self, source, ctx):
        known = self.__dict__.setdefault("known", {})
        if source.token not in known:
            found = Folder.restore(self, source, ctx)
            known[source.token] = [BytesArtifact(one.name, one.read_at(0, one.size)) for one in found]
        return known[source.token]


@backupcore.driver
class ManifestLast(Folder):
    """Deletes a backup from its begin to its end."""

    @hookimpl
    def delete(self, sources):
        for source in sources:
            folder = self.path / source.token
            for file in sorted(folder.glob("[!.]*"), key=lambda one: one.name == NAME):
                file.unlink()
            shutil.rmtree(folder, ignore_errors=True)
        return True
