"""Drivers that leave something behind on this host."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading

import backupcore
from backupcore import hookimpl
from tests.testing.folder import Filled, Folder


def child() -> None:
    subprocess.Popen(["sleep", "300"], start_new_session=True)


@backupcore.driver
class Littering(Folder):
    @hookimpl
    def backup(self, artifacts, run, ctx):
        child()
        return Folder.backup(self, artifacts, run, ctx)


@backupcore.driver
class Spooling(Filled):
    """Writes each artifact to a file for the time being, and forgets it there."""

    def keep(self, artifact, folder):
        with artifact.open() as source, tempfile.NamedTemporaryFile(delete=False) as spool:
            shutil.copyfileobj(source, spool)
        shutil.copy(spool.name, folder / artifact.name)


@backupcore.driver
class Threaded(Folder):
    """Begins a thread for each backup, which waits for work for ever."""

    @hookimpl
    def backup(self, artifacts, run, ctx):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        return Folder.backup(self, artifacts, run, ctx)


@backupcore.driver
class Open(Folder):
    """Never closes what it has opened."""

    @hookimpl
    def backup(self, artifacts, run, ctx):
        os.open(self.path, os.O_RDONLY)
        return Folder.backup(self, artifacts, run, ctx)
