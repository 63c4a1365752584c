"""A hypervisor and a driver that live in files, so that several processes of a test see the same VMs and backups.

Both are real plugins, found by their entry points. A test makes them wait or fail by putting a file where they look.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import backupcore
from backupcore import hookimpl
from backupcore.context import Context
from backupcore.errors import (
    HypervisorError,
    IncrementImpossible,
    Locked,
    SourceNotFound,
    TargetFull,
    TargetUnavailable,
)
from backupcore.hypervisor import Checkpoint, VMState
from backupcore.model import (
    VM,
    Artifact,
    BackupRun,
    LeftOut,
    Listed,
    Outcome,
    Prepared,
    SourceRef,
    Stored,
    Usage,
    new_id,
)
from backupcore.testing.guest import MemoryGuest, MemoryHypervisor

WEB = VM(uuid="11111111-1111-4111-8111-111111111111", name="web1")
DB = VM(uuid="22222222-2222-4222-8222-222222222222", name="db1")


def load(path: Path) -> list[MemoryGuest]:
    return pickle.loads(path.read_bytes())


def save(path: Path, guests: Iterable[MemoryGuest]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(pickle.dumps(list(guests)))
    temporary.rename(path)


class FileHypervisor(MemoryHypervisor):
    """`uri` is ``file://`` and the path of the pickled guests; a file ``clock`` beside them says what time it is."""

    def __init__(self, *, uri: str, scratch: Path) -> None:
        self.path = Path(uri.removeprefix("file://"))
        self.scratch = scratch
        super().__init__([], self.now)

    def now(self) -> datetime:
        clock = self.path.with_name("clock")
        return datetime.fromisoformat(clock.read_text()) if clock.exists() else datetime.now(UTC)

    def read(self) -> None:
        if not self.path.exists():
            raise HypervisorError("the hypervisor is away", "Start it.")
        self.guests = {guest.vm.uuid: guest for guest in load(self.path)}

    @hookimpl
    def prebackup(self, run: BackupRun, ctx: Context) -> Prepared | None:
        self.read()
        prepared = super().prebackup(run, ctx)
        save(self.path, self.guests.values())
        if prepared is not None and self.path.with_name("nvram-is-away").exists():
            return replace(prepared, left_out=(LeftOut(id="nvram", reason="/nvram is missing", missed=True),))
        return prepared

    @hookimpl
    def postbackup(self, run: BackupRun, outcome: Outcome) -> None:
        if self.path.with_name("die-in-release").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        self.read()
        super().postbackup(run, outcome)
        save(self.path, self.guests.values())
        with self.path.with_name("released").open("a") as file:
            file.write(f"{run.id} {outcome.state.value} {run.point}\n")
        if self.path.with_name("fail-release").exists():
            raise HypervisorError("the guest could not be released", "See to it.")

    def recover(self, vm: VM, spent: Collection[str], ctx: Context, installation: str = "") -> None:
        self.read()
        super().recover(vm, spent, ctx, installation)
        save(self.path, self.guests.values())

    def require_definable(self, name: str, uuid: str | None, folder: Path) -> None:
        self.read()
        super().require_definable(name, uuid, folder)

    def define(self, definition: bytes) -> VM:
        self.read()
        vm = super().define(definition)
        save(self.path, self.guests.values())
        return vm

    def vms(self) -> Sequence[VMState]:
        self.read()
        return super().vms()

    def find(self, vm: str, defaults: Mapping[str, str] | None = None) -> VMState:
        self.read()
        return super().find(vm, defaults)

    def checkpoints(self, vm: VM) -> Sequence[Checkpoint]:
        self.read()
        return super().checkpoints(vm)

    def forget(self, vm: VM, installation: str = "", *, foreign: bool = False) -> Sequence[str]:
        gone = super().forget(vm, installation, foreign=foreign)
        save(self.path, self.guests.values())
        return gone

    def settings(self, vm: VM) -> Mapping[str, str]:
        self.read()
        return super().settings(vm)

    def configure(self, vm: VM, settings: dict[str, str]) -> None:
        super().configure(vm, settings)
        save(self.path, self.guests.values())


def wild(store: Path, hook: str) -> None:
    """Do what a file ``wild`` in the store says: ``HOOK ACTION``, one of `ACTIONS` at that hook, or at ``all``."""
    if (store / "wild").exists():
        where, action = (store / "wild").read_text().split()
        if where in (hook, "all"):
            ACTIONS[action]()


def _print() -> None:
    print("printed by a driver")  # noqa: T201 - what is tested
    os.write(1, b"written by a C library\n")
    subprocess.run(["echo", "printed by a child"], check=True)
    thread = threading.Thread(target=print, args=["printed by a thread"])
    thread.start()
    thread.join()


def _go_on() -> None:
    def work() -> None:
        while True:
            print("and on")  # noqa: T201 - what is tested
            time.sleep(0.5)

    threading.Thread(target=work, name="endless", daemon=False).start()


def _end_well() -> None:
    atexit.register(os._exit, 0)
    sys.exit = lambda *_: None  # type: ignore[assignment]  # what is tested
    raise TargetUnavailable("the store is away", "Bring it back.")


def _curse() -> None:
    raise TargetUnavailable("\x1b[2J\u202eall is well", "\x9bHint") from OSError("\x1b]0;title\x07")


def _pool() -> None:
    """What `multiprocessing.Pool` does at its end, which may come as soon as its processes are there."""
    child = os.fork()
    if not child:
        time.sleep(30)
        os._exit(9)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


class _Unspeakable(Exception):
    def __str__(self) -> str:
        return sys.exit(0) or ""


def _speak_not() -> None:
    raise _Unspeakable


ACTIONS = {
    "speak-not": _speak_not,
    "curse": _curse,
    "end-well": _end_well,
    "leave": lambda: sys.exit(0),
    "close": lambda: os.closerange(3, 4096),
    "exec": lambda: os.execvp("true", ["true"]),
    "print": _print,
    "go-on": _go_on,
    "pool": _pool,
}


class FileArtifact(Artifact):
    """One file of a source; nothing of it is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.size = path.stat().st_size

    def open(self) -> BinaryIO:
        wild(self.path.parent.parent, "open")
        return self.path.open("rb")

    def read_at(self, offset: int, length: int) -> bytes:
        wild(self.path.parent.parent, "read_at")
        with self.path.open("rb") as file:
            return os.pread(file.fileno(), length, offset)


@backupcore.driver
class FileDriver:
    """One folder per source. ``wait`` in its folder holds a backup up until it is gone or the run is cancelled.

    So does ``deaf``, whatever the user wants; ``exit`` ends the process with the exit code in it, ``close-all`` closes
    every file that the process has open, and with ``owes`` it cannot tidy up. With ``fork`` it is killed and leaves a
    child behind, with ``fork-and-return`` that child goes on with the backup. ``token`` holds the token of each
    backup, as of a driver that keeps a folder a day. With ``append-only`` it deletes nothing; all that is there when
    ``locked-until`` is made is locked until the date in that. With ``sizes`` a listing
    tells them, with ``lists-nothing`` it is empty.
    """

    path: Path = backupcore.option("where the backups lie")
    password_file: Path | None = backupcore.option("nothing is read from it", default=None)

    @hookimpl
    def prebackup(self, run: BackupRun) -> Prepared | None:
        wild(self.path, "prebackup")
        if not self.path.is_dir():
            raise TargetUnavailable(f"{self.path} is away", "Bring it back.")
        for source in run.builds_on:
            if not (self.path / source.token).is_dir():
                raise IncrementImpossible(f"source {source} is gone")
        return None

    @hookimpl
    def backup(self, artifacts: Sequence[Artifact], run: BackupRun, ctx: Context) -> Stored:
        wild(self.path, "backup")
        waiting = self.path / "wait"
        if waiting.exists():
            said = self.path / "waits.new"  # renamed: a test that sees the file also sees what it says
            said.write_text(run.id)
            said.rename(self.path / "waits")
        while waiting.exists():
            ctx.wait(0.02)
        while (self.path / "deaf").exists():
            (self.path / "waits").write_text(run.id)
            time.sleep(0.02)  # a driver that does not listen
        if (self.path / "exit").exists():
            os._exit(int((self.path / "exit").read_text()))
        if (self.path / "close-all").exists():
            os.closerange(3, 4096)
        if (self.path / "fork").exists():
            child = os.fork()
            if not child:
                os.closerange(0, 3)
                signal.pause()
            (self.path / "forked").write_text(str(child))
            os.kill(os.getpid(), signal.SIGKILL)
        if (self.path / "fork-and-return").exists() and (child := os.fork()):
            os.waitpid(child, 0)
        token = (self.path / "token").read_text() if (self.path / "token").exists() else new_id()
        if (self.path / "talk").exists():
            ctx.log.debug("token is %s", token)
        folder = self.path / f".{token}"
        folder.mkdir()
        size = 0
        for artifact in artifacts:
            with artifact.open() as source, (folder / artifact.name).open("wb") as target:
                shutil.copyfileobj(source, target)
                size += target.tell()
        (folder / ".labels").write_text(json.dumps(run.labels))
        shutil.rmtree(self.path / token, ignore_errors=True)
        folder.rename(self.path / token)
        if (self.path / "die").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if (self.path / "away-once-stored").exists():
            raise TargetUnavailable(f"{self.path} is away", "Bring it back.")
        return Stored(source=SourceRef(token), stored=size)

    @hookimpl
    def postbackup(self) -> None:
        wild(self.path, "postbackup")
        if (self.path / "owes").exists():
            raise TargetUnavailable(f"{self.path} is away", "Bring it back.")

    @hookimpl
    def restore(self, source: SourceRef, ctx: Context) -> Sequence[Artifact]:
        wild(self.path, "restore")
        if not (self.path / source.token).is_dir():
            raise SourceNotFound(f"no source {source}")
        while (self.path / "wait-restore").exists():
            (self.path / "waits").touch()
            ctx.wait(0.02)
        files = [file for file in (self.path / source.token).iterdir() if file.name != ".labels"]
        return [FileArtifact(file) for file in files]

    @hookimpl
    def locks(self, sources: Sequence[SourceRef]) -> dict[SourceRef, datetime | None]:
        lock = self.path / "locked-until"
        if not lock.exists():
            return {}
        until = datetime.fromisoformat(lock.read_text())
        made = lock.stat().st_mtime_ns
        there = [one for one in sources if (self.path / one.token).is_dir() and until > datetime.now(UTC)]
        return {one: until for one in there if (self.path / one.token).stat().st_mtime_ns < made}

    @hookimpl
    def delete(self, sources: Sequence[SourceRef]) -> bool:
        wild(self.path, "delete")
        if (self.path / "append-only").exists():
            with (self.path / "refused").open("a") as file:
                file.write("x")
            raise Locked(f"{self.path} is append-only", "It waits.")
        if locked := self.locks(sources):
            raise Locked(f"{self.path} locks", "It waits.", until=max(filter(None, locked.values())))
        if (self.path / "fail-delete").exists():
            raise TargetUnavailable(f"{self.path} is away", "Bring it back.")
        for source in sources:
            shutil.rmtree(self.path / source.token, ignore_errors=True)
            with (self.path / "deleted").open("a") as file:
                file.write(f"{source}\n")
        return True

    @hookimpl
    def sources(self) -> Iterable[Listed]:
        wild(self.path, "sources")
        if (self.path / "strings").exists():
            yield "a string"  # type: ignore[misc]  # what is tested
        if not self.path.is_dir():
            raise TargetUnavailable(f"{self.path} is away", "Bring it back.")
        if (self.path / "lists-nothing").exists():
            return
        for folder in self.path.glob("[!.]*/.labels"):
            files = [file for file in folder.parent.iterdir() if file != folder]
            size = sum(file.stat().st_size for file in files) if (self.path / "sizes").exists() else None
            yield Listed(source=SourceRef(folder.parent.name), labels=json.loads(folder.read_text()), size=size)

    @hookimpl
    def check(self) -> bool:
        wild(self.path, "check")
        if not self.path.is_dir():
            raise TargetUnavailable(f"{self.path} is away", "Bring it back.")
        return True

    @hookimpl
    def identity(self, make: bool) -> str | None:
        if not self.path.is_dir():
            raise TargetUnavailable(f"{self.path} is away", "Bring it back.")
        marker = self.path / ".identity"
        if make and not marker.exists():
            made = self.path / f".identity.{new_id()}"
            made.write_text(new_id())
            with contextlib.suppress(FileExistsError):
                marker.hardlink_to(made)
            made.unlink()
        return marker.read_text() if marker.exists() else None

    @hookimpl
    def usage(self) -> Usage:
        wild(self.path, "usage")
        return Usage(used=sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file()))


@backupcore.driver
class PlainDriver(FileDriver):
    """The same as by somebody who has not heard of identities."""

    identity = None  # type: ignore[assignment]  # no hook


class Note:
    """A site plugin: it notes, beside the datastore, which VM is being backed up."""

    @hookimpl(wrapper=True)
    def backup(self, run: BackupRun, ctx: Context) -> Generator[None, Stored, Stored]:
        stored = yield
        (ctx.folder.parent.parent.parent / "noted").write_text(run.vm.name)
        return stored


class Watch:
    """A site plugin: it stops a run with an error, as a watch over scratch does, once there is a file ``full``."""

    @hookimpl(wrapper=True)
    def backup(self, ctx: Context) -> Generator[None, Stored, Stored]:
        full = ctx.folder.parent.parent.parent / "full"

        def watch() -> None:
            while not full.exists():
                time.sleep(0.01)
            ctx.fail(TargetFull("scratch is full", "Make room there."))

        threading.Thread(target=watch, daemon=True).start()
        return (yield)


class Filler:
    """A site plugin: somebody fills the state folder's file system while a backup is stored.

    With a file ``greedy`` beside it the room that the run holds for its record is taken as well.
    """

    @hookimpl(wrapper=True)
    def backup(self, ctx: Context) -> Generator[None, Stored, Stored]:
        state = ctx.folder.parent.parent
        if (state.parent / "greedy").exists():
            _held.append((ctx.folder / "room").open("rb"))  # what is open stays when its name goes
        stored = yield
        free = os.statvfs(state).f_bavail * os.statvfs(state).f_frsize
        (state / "somebody else's").write_bytes(bytes(free))
        return stored


_held: list[BinaryIO] = []


def let_go() -> None:
    """Give back the room that a `Filler` has taken."""
    while _held:
        _held.pop().close()
