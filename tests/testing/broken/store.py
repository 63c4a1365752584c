"""Drivers that do not see what their store refuses, or wait for it for ever."""

from __future__ import annotations

import contextlib

import backupcore
from backupcore import hookimpl
from backupcore.errors import BackupError
from tests.testing.depot import Depot
from tests.testing.folder import Filled


@backupcore.driver
class Hopeful(Filled):
    """Takes what cannot be written for written."""

    def keep(self, artifact, folder):
        with artifact.open() as source, (folder / artifact.name).open("wb", buffering=0) as target:
            while block := source.read(1 << 20):
                with contextlib.suppress(OSError):
                    target.write(block)


@backupcore.driver
class Deaf(Depot):
    """Closes its connection on a cancel, which wakes no receive."""

    def waker(self, connection):
        return connection.close


@backupcore.driver
class Unheeding(Depot):
    """Takes each answer for a good one."""

    def check_status(self, answer, what):
        if answer.status == 404:
            Depot.check_status(self, answer, what)


@backupcore.driver
class Assuring(Depot):
    """Says that all is deleted, whatever the server answers."""

    @hookimpl
    def delete(self, sources, ctx):
        with contextlib.suppress(BackupError):
            Depot.delete(self, sources, ctx)
        return True
