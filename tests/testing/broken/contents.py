"""Drivers that do not give back what they were given."""

from __future__ import annotations

import os
import shutil

import backupcore
from backupcore import hookimpl
from tests.testing.folder import ZEROS, Filled, Folder


@backupcore.driver
class NoEmptyFiles(Filled):
    def keep(self, artifact, folder):
        if artifact.size:
            Filled.keep(self, artifact, folder)


@backupcore.driver
class Textual(Filled):
    def keep(self, artifact, folder):
        Filled.keep(self, artifact, folder)
        if artifact.name == "vm.xml":
            path = folder / artifact.name
            path.write_bytes(path.read_bytes().replace(b"\r\n", b" \n"))


@backupcore.driver
class LastBlock(Filled):
    """Loses what comes after the last full MiB."""

    def keep(self, artifact, folder):
        with artifact.open() as source, (folder / artifact.name).open("wb") as target:
            while len(block := source.read(1 << 20)) == 1 << 20:
                target.write(block)
            target.write(bytes(len(block)))


@backupcore.driver
class Lower(Filled):
    def keep(self, artifact, folder):
        with artifact.open() as source, (folder / artifact.name.lower()).open("wb") as target:
            shutil.copyfileobj(source, target)


@backupcore.driver
class OwnNames(Filled):
    """Keeps its labels among the artifacts."""

    @hookimpl
    def restore(self, source, ctx):
        return [one for one in Folder.restore(self, source, ctx) if one.name != "labels.json"]


class Cut(Filled):
    """Keeps what comes before `most`, and leaves the rest of its room empty."""

    most = 32 << 20

    def keep(self, artifact, folder):
        Filled.keep(self, artifact, folder)
        if artifact.size > self.most:
            os.truncate(folder / artifact.name, self.most)
            os.truncate(folder / artifact.name, artifact.size)


@backupcore.driver
class Short(Cut):
    pass


@backupcore.driver
class Unsigned(Cut):
    """Counts with 32 bits."""

    most = 4 << 30


@backupcore.driver
class Hoarding(Filled):
    """Holds each artifact whole in memory."""

    def keep(self, artifact, folder):
        pieces = []
        with artifact.open() as source:
            while block := source.read(1 << 20):
                pieces.append(bytearray(block))
        with (folder / artifact.name).open("wb") as target:
            for block in pieces:
                if block == ZEROS:
                    target.seek(len(block), os.SEEK_CUR)
                else:
                    target.write(block)
            target.truncate()
