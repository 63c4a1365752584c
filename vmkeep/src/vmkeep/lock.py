"""Locks between processes of this host: one per VM for runs, and one per image, shared or exclusive.

They are flocks, so the kernel lets go of them when their process dies, however it dies. A lock file is never removed:
a process that waits for the removed file and one that makes a new one would both hold "the" lock. That of a VM says who
holds it, for `cancel`.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from backupcore.errors import Busy, from_os_error
from backupcore.model import VM, Image

__all__ = ["Holder", "holder", "image_exclusive", "image_shared", "vm_run"]

_LENGTH = 4096  # bytes; the name of a VM has 200 at most, and JSON writes one letter in twelve


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds the lock of a VM: the process, since when, what it does, and the lock's file."""

    vm: VM
    process: int
    since: datetime
    doing: str
    path: Path


def _open(state: Path, name: str) -> int:
    folder = state / "locks"
    try:
        state.mkdir(mode=0o711, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        return os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise from_os_error(error, f"the lock folder {folder}") from error


def _read(handle: int, path: Path) -> Holder | None:
    try:
        found = json.loads(os.pread(handle, _LENGTH, 0))
        return Holder(
            vm=VM(uuid=str(found["vm"]["uuid"]), name=str(found["vm"]["name"])),
            process=int(found["process"]),
            since=datetime.fromisoformat(found["since"]).astimezone(),
            doing=str(found["doing"]),
            path=path,
        )
    except (ValueError, KeyError, TypeError):
        return None  # its holder has locked it and not yet written who it is


def holder(state: Path, reference: str) -> Holder | None:
    """Who works on the VM of this name or UUID now; None if nobody does. Asks the lock files only, no libvirt."""
    for path in sorted((state / "locks").glob("vm-*")):
        try:
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise from_os_error(error, "a lock") from error
        try:
            found = _read(handle, path)
            if found and reference in (found.vm.name, found.vm.uuid) and _locked(handle):
                return found
        finally:
            os.close(handle)
    return None


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


@contextmanager
def vm_run(state: Path, vm: VM, doing: str = "a backup") -> Iterator[None]:
    """Be the only one that works on this VM, by UUID, on this host. Busy at once, with what it does, if another is."""
    name = f"vm-{vm.uuid}"
    handle = _open(state, name)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = _read(handle, state / "locks" / name)
            who = f" (process {other.process}, since {other.since:%Y-%m-%d %H:%M:%S})" if other else ""
            raise Busy(
                f"{other.doing if other else 'a backup'} of VM {vm.name} is already running{who}",
                f"Wait for its end, then run it again; or stop it: vmkeep cancel {vm.name}",
            ) from None
        entry = {"process": os.getpid(), "since": _now(), "doing": doing, "vm": {"uuid": vm.uuid, "name": vm.name}}
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(entry).encode(), 0)
        yield
        os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


@contextmanager
def _image(state: Path, image: Image, how: int, doing: str = "") -> Iterator[None]:
    handle = _open(state, f"image-{image.uuid}")
    try:
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
        except BlockingIOError:
            other = _doing(handle)
            raise Busy(f"image {image.number} is in use: {other}", "Wait for its end, then run it again.") from None
        if doing:
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps({"process": os.getpid(), "since": _now(), "doing": doing}).encode(), 0)
        yield
        if doing:
            os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def _doing(handle: int) -> str:
    try:
        found = json.loads(os.pread(handle, 500, 0))
        if Path(f"/proc/{int(found['process'])}").exists():  # one that was killed has left its word behind
            since = datetime.fromisoformat(found["since"]).astimezone()
            return f"{found['doing']} (process {int(found['process'])}, since {since:%Y-%m-%d %H:%M:%S})"
    except (ValueError, KeyError, TypeError):
        pass
    return "a backup or a restore works with it"


@contextmanager
def image_shared(state: Path, image: Image) -> Iterator[None]:
    """Keep an image as it is meanwhile, for a restore or while an increment is added. Busy at once, with a reason."""
    with _image(state, image, fcntl.LOCK_SH):
        yield


@contextmanager
def image_exclusive(state: Path, image: Image, doing: str = "it is being changed") -> Iterator[None]:
    """Be the only one that works on an image; `doing` tells others why they cannot. Busy at once."""
    with _image(state, image, fcntl.LOCK_EX, doing):
        yield
