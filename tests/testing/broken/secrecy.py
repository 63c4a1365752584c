"""Drivers that show a secret."""

from __future__ import annotations

import subprocess

import backupcore
from backupcore import hookimpl
from backupcore.errors import BackupError
from tests.testing.folder import Folder


@backupcore.driver
class Logging(Folder):
    @hookimpl
    def backup(self, artifacts, run, ctx):
        ctx.log.debug("opening %s", self.url)
        return Folder.backup(self, artifacts, run, ctx)


@backupcore.driver
class Arguing(Folder):
    @hookimpl
    def backup(self, artifacts, run, ctx):
        with subprocess.Popen(["sh", "-c", "read _; exit 0", f"--url={self.url}"], stdin=subprocess.PIPE) as process:
            try:
                return Folder.backup(self, artifacts, run, ctx)
            finally:
                process.kill()


@backupcore.driver
class Quoting(Folder):
    @hookimpl
    def restore(self, source, ctx):
        try:
            return Folder.restore(self, source, ctx)
        except BackupError as error:
            raise type(error)(f"{error} in {self.url}") from error


@backupcore.driver
class Reading(Folder):
    """Shows what lies in its password file."""

    @hookimpl
    def backup(self, artifacts, run, ctx):
        ctx.log.debug("password: %s", self.password_file.read_text() if self.password_file else "")
        return Folder.backup(self, artifacts, run, ctx)
