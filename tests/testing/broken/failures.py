"""Drivers that do not see, or do not tell, that a backup has failed or was stopped."""

from __future__ import annotations

import contextlib
import time

import backupcore
from backupcore import hookimpl
from backupcore.errors import BackupError, Cancelled, ContractViolation, TargetUnavailable
from tests.testing.folder import Filled, Folder


@backupcore.driver
class Stubborn(Filled):
    """What cannot be read is left out."""

    def keep(self, artifact, folder):
        with contextlib.suppress(BackupError):
            Filled.keep(self, artifact, folder)


@backupcore.driver
class Blaming(Filled):
    def keep(self, artifact, folder):
        try:
            Filled.keep(self, artifact, folder)
        except BackupError as error:
            raise TargetUnavailable(str(error)) from error


@backupcore.driver
class Padding(Filled):
    def keep(self, artifact, folder):
        try:
            Filled.keep(self, artifact, folder)
        except ContractViolation:
            with (folder / artifact.name).open("ab") as target:
                target.truncate(artifact.size)


@backupcore.driver
class LeavingParts(Filled):
    """Publishes what it has when it is stopped."""

    def keep(self, artifact, folder):
        with contextlib.suppress(Cancelled):
            Filled.keep(self, artifact, folder)


@backupcore.driver
class Slow(Filled):
    """Takes its time to notice that it is to stop."""

    @hookimpl
    def backup(self, artifacts, run, ctx):
        try:
            return Filled.backup(self, artifacts, run, ctx)
        except Cancelled:
            time.sleep(1.5)
            raise


@backupcore.driver
class Asleep(Folder):
    """Waits a while once all is there, and hears nothing meanwhile."""

    @hookimpl
    def backup(self, artifacts, run, ctx):
        stored = Folder.backup(self, artifacts, run, ctx)
        time.sleep(1.5)
        return stored
