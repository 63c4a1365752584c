"""Drivers with one fault each. Every check of the kit must find one of them at least."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import backupcore
from backupcore import hookimpl
from backupcore.errors import (
    BackupError,
    Cancelled,
    ContractViolation,
    IncrementImpossible,
    SourceNotFound,
    TargetUnavailable,
)
from backupcore.manifest import NAME
from backupcore.model import Artifact, BytesArtifact, Listed, SourceRef, Stored, Usage, new_id
from tests.testing.depot import Depot
from tests.testing.folder import ZEROS, Folder, StoredFile, write


def child() -> None:
    subprocess.Popen(["sleep", "300"], start_new_session=True)


@backupcore.driver
class Filled(Folder):
    """A folder whose `backup` is made of parts that a subclass can replace."""

    def token(self, run: Any, artifacts: Any) -> str:
        return new_id()

    def keep(self, artifact: Artifact, folder: Path) -> None:
        write(artifact, folder / artifact.name)

    def labels(self, run: Any) -> dict[str, str]:
        return run.labels

    @hookimpl
    def backup(self, artifacts, run, ctx):
        token = self.token(run, artifacts)
        part = self.path / f".{token}.{new_id()}"
        part.mkdir()
        try:
            for artifact in artifacts:
                self.keep(artifact, part)
            (part / ".labels").write_text(json.dumps(self.labels(run)))
            shutil.rmtree(self.path / token, ignore_errors=True)
            part.rename(self.path / token)
        except BaseException:
            shutil.rmtree(part)
            raise
        return Stored(source=SourceRef(token))


# Opening, options


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
class Silent(Folder):
    tries: int = backupcore.option("", default=3)


@backupcore.driver
class OpenPassword(Folder):
    password: str = backupcore.option("the password", default="")


@backupcore.driver
class Talkative(Folder):
    def __repr__(self) -> str:
        return f"Talkative({self.url})"


# Verbs


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
class Trusting(Folder):
    @hookimpl
    def prebackup(self):
        return None


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


# Contents


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


class Shifted(StoredFile):
    def read_at(self, offset: int, length: int) -> bytes:
        return (
            super().read_at(max(0, offset - 1), length)
            if offset + length < self.size
            else super().read_at(offset, length)
        )


class Unbounded(StoredFile):
    def read_at(self, offset: int, length: int) -> bytes:
        if offset >= self.size:
            raise EOFError("nothing there")
        return super().read_at(offset, length)


@dataclass(frozen=True)
class Shared(StoredFile):
    """All its streams share one place in the file."""

    file: list[BinaryIO] = field(default_factory=list)

    def open(self) -> BinaryIO:
        if not self.file or self.file[0].closed:
            self.file[:] = [self.path.open("rb", buffering=0)]
        return Borrowed(self.file[0])  # type: ignore[return-value]  # it has what is needed of a stream

    def __reduce__(self):
        return type(self), (self.path,)


class Borrowed:
    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def read(self, count: int = -1) -> bytes:
        time.sleep(0.001)
        return self.file.read(count)

    def close(self) -> None:
        pass


class FragileStream(Borrowed):
    """Cannot be closed before its end."""

    def close(self) -> None:
        rest = self.file.read(1)
        self.file.close()
        if rest:
            raise RuntimeError("closed before its end")


class Fragile(StoredFile):
    def open(self) -> BinaryIO:
        return FragileStream(self.path.open("rb"))  # type: ignore[return-value]  # as above


class Piped(StoredFile):
    """Reads through a program that nobody ends."""

    def open(self) -> BinaryIO:
        child()
        return super().open()


class Locked(StoredFile):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        object.__setattr__(self, "lock", threading.Lock())


class Elsewhere(StoredFile):
    """What it was opened with does not go along to another process."""

    def __reduce__(self):
        return type(self), (self.path.parent / "elsewhere" / self.path.name,)


def giving(kind: type[StoredFile]) -> type:
    """A folder whose artifacts are of this kind."""

    @backupcore.driver
    class Giving(Folder):
        @hookimpl
        def restore(self, source, ctx):
            return [kind(one.path) for one in Folder.restore(self, source, ctx)]

    return Giving


# Tokens


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


# Listing and deleting


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


# What goes wrong


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
class Littering(Folder):
    @hookimpl
    def backup(self, artifacts, run, ctx):
        child()
        return Folder.backup(self, artifacts, run, ctx)


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


# Others


@backupcore.driver
class OnePlace(Folder):
    """All its backups are made in the same folder."""

    @hookimpl
    def backup(self, artifacts, run, ctx):
        part, token = self.path / ".part", new_id()
        part.mkdir(exist_ok=True)
        for artifact in artifacts:
            Filled.keep(self, artifact, part)  # type: ignore[arg-type]  # as above
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


# Secrets


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


# The whole


@backupcore.driver
class FullsOnly(Folder):
    @hookimpl
    def prebackup(self, run):
        if run.builds_on:
            raise IncrementImpossible("this driver takes no increments")


@backupcore.driver
class Vague(Folder):
    """Takes a damaged file for a datastore that is away."""

    @hookimpl
    def restore(self, source, ctx):
        raise TargetUnavailable("something is wrong")


# What is found by its own check alone


@backupcore.driver
class Negative(Folder):
    """Says how much less there is now."""

    @hookimpl
    def backup(self, artifacts, run, ctx):
        return replace(Folder.backup(self, artifacts, run, ctx), stored=-5)


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
class Stringy(Folder):
    @hookimpl
    def sources(self):
        return [one.source.token for one in Folder.sources(self)]


@backupcore.driver
class Quitting(Folder):
    @hookimpl
    def usage(self):
        raise SystemExit(0)


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


@backupcore.driver
class Hopeful(Filled):
    """Takes what cannot be written for written."""

    def keep(self, artifact, folder):
        with artifact.open() as source, (folder / artifact.name).open("wb", buffering=0) as target:
            while block := source.read(1 << 20):
                with contextlib.suppress(OSError):
                    target.write(block)


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


@backupcore.driver
class Asleep(Folder):
    """Waits a while once all is there, and hears nothing meanwhile."""

    @hookimpl
    def backup(self, artifacts, run, ctx):
        stored = Folder.backup(self, artifacts, run, ctx)
        time.sleep(1.5)
        return stored


# Over the network


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
