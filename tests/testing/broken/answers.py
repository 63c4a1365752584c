"""Drivers whose verbs answer what the contract does not say, or fail where they should not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import backupcore
from backupcore import hookimpl
from backupcore.errors import IncrementImpossible, TargetUnavailable
from backupcore.model import Usage
from tests.testing.folder import Filled, Folder


@backupcore.driver
class NoAnswer(Folder):
    @hookimpl
    def check(self):
        return None


@backupcore.driver
class Unsure(Folder):
    @hookimpl
    def delete(self, sources):
        Folder.delete(self, sources)
        return False


@backupcore.driver
class Careless(Folder):
    @hookimpl
    def check(self):
        return True


@backupcore.driver
class Creating(Folder):
    """Makes its folder if it is not there, as if a disk that is not mounted were an empty one."""

    @hookimpl
    def check(self):
        self.path.mkdir(exist_ok=True)
        return True


@backupcore.driver
class Negative(Folder):
    """Says how much less there is now."""

    @hookimpl
    def backup(self, artifacts, run, ctx):
        return replace(Folder.backup(self, artifacts, run, ctx), stored=-5)


@backupcore.driver
class Stringy(Folder):
    @hookimpl
    def sources(self):
        return [one.source.token for one in Folder.sources(self)]


@backupcore.driver
class Boastful(Folder):
    @hookimpl
    def usage(self):
        return Usage(used=1, total=10, free=11)


@backupcore.driver
class Fractional(Folder):
    @hookimpl
    def usage(self):
        return Usage(used=1.5)  # type: ignore[arg-type]  # what is tested


@backupcore.driver
class Quitting(Folder):
    @hookimpl
    def usage(self):
        raise SystemExit(0)


@backupcore.driver
class Trusting(Folder):
    @hookimpl
    def prebackup(self):
        return None


@backupcore.driver
class FullsOnly(Folder):
    @hookimpl
    def prebackup(self, run):
        if run.builds_on:
            raise IncrementImpossible("this driver takes no increments")


@backupcore.driver
class Once(Filled):
    """Its postbackup needs what its backup has left."""

    @hookimpl
    def backup(self, artifacts, run, ctx):
        (self.path / f".run-{run.id}").touch()
        return Filled.backup(self, artifacts, run, ctx)

    @hookimpl
    def postbackup(self, run):
        (self.path / f".run-{run.id}").unlink()


@backupcore.driver
class Zealous(Folder):
    """Its postbackup sweeps what it takes for unfinished: every source of this VM that it was not told is recorded."""

    @hookimpl
    def postbackup(self, run, outcome):
        if outcome.stored is None:
            for labels in self.path.glob("[!.]*/.labels"):
                if json.loads(labels.read_text())["vm"] == run.vm.uuid:
                    shutil.rmtree(labels.parent)


@backupcore.driver
class Vague(Folder):
    """Takes a damaged file for a datastore that is away."""

    @hookimpl
    def restore(self, source, ctx):
        raise TargetUnavailable("something is wrong")
