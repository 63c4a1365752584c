"""Drivers that give, or believe, the wrong tokens."""

from __future__ import annotations

import contextlib
import hashlib
import shutil

import backupcore
from backupcore import hookimpl
from backupcore.errors import SourceNotFound, TargetUnavailable
from backupcore.model import SourceRef, Stored, new_id
from tests.testing.folder import Filled, Folder


@backupcore.driver
class Remembering(Filled):
    """Knows its sources in memory only."""

    @hookimpl
    def restore(self, source, ctx):
        known = self.__dict__.setdefault("known", set())
        if source.token not in known:
            raise SourceNotFound("never seen")
        return Folder.restore(self, source, ctx)


@backupcore.driver
class Stringly(Filled):
    @hookimpl
    def backup(self, artifacts, run, ctx):
        return Stored(source=Filled.backup(self, artifacts, run, ctx).source.token)  # type: ignore[arg-type]


@backupcore.driver
class ByContent(Filled):
    def token(self, run, artifacts):
        digest = hashlib.sha256(run.vm.uuid.encode())
        for artifact in artifacts:
            digest.update(artifact.read_at(0, artifact.size))
        return digest.hexdigest()[:32]


@backupcore.driver
class Prefixed(Folder):
    @hookimpl
    def restore(self, source, ctx):
        found = sorted(self.path.glob(f"{source.token}*"))
        return Folder.restore(self, SourceRef(found[0].name) if found else source, ctx)


@backupcore.driver
class Sloppy(Folder):
    """Deletes by prefix."""

    @hookimpl
    def delete(self, sources):
        for source in sources:
            for folder in self.path.glob(f"{source.token}*"):
                shutil.rmtree(folder)
        return True


@backupcore.driver
class Halves(Filled):
    """A token of two parts, of which it looks at one."""

    def token(self, run, artifacts):
        return f"{run.vm.uuid}.{new_id()}"

    @hookimpl
    def restore(self, source, ctx):
        found = list(self.path.glob(f"*.{source.token.split('.')[-1]}"))
        return Folder.restore(self, SourceRef(found[0].name) if found else source, ctx)


@backupcore.driver
class Numbered(Filled):
    """Numbers the backups of a VM, by those that are there."""

    @hookimpl
    def backup(self, artifacts, run, ctx):
        kept = SourceRef(Filled.backup(self, artifacts, run, ctx).source.token)
        for number in range(1, 1000):
            token = f"{run.vm.uuid}.{number}"
            with contextlib.suppress(OSError):
                (self.path / kept.token).rename(self.path / token)
                return Stored(source=SourceRef(token))
        raise TargetUnavailable("no number is left")
