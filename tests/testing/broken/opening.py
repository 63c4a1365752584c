"""Drivers that cannot be opened as they are, or whose options are not as they should be."""

from __future__ import annotations

from pathlib import Path

import backupcore
from backupcore import hookimpl
from tests.testing.folder import Folder


@backupcore.driver
class Default(Folder):
    @hookimpl
    def check(self, ctx=None):
        return True


@backupcore.driver
class Misspelt(Folder):
    @hookimpl
    def chek(self):
        return True


@backupcore.driver
class Lacking:
    path: Path = backupcore.option("a folder")

    @hookimpl
    def backup(self, artifacts, run, ctx):
        return None


@backupcore.driver
class Singular(Folder):
    @hookimpl
    def delete(self, source):
        return Folder.delete(self, [source])


@backupcore.driver
class Undecorated(Folder):
    def delete(self, sources):
        return Folder.delete(self, sources)


@backupcore.driver
class Silent(Folder):
    tries: int = backupcore.option("", default=3)


@backupcore.driver
class OpenPassword(Folder):
    password: str = backupcore.option("the password", default="")


@backupcore.driver
class Talkative(Folder):
    def __repr__(self) -> str:
        return f"Talkative({self.url})"
