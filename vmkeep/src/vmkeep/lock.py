"""Locks between processes of this host: one per VM for runs, and one per image, shared or exclusive.

They are flocks, so the kernel lets go of them when their process dies, however it dies. That of a VM says who holds it,
for `cancel`.

A process that was killed while a thread of it waits in the kernel (for a datastore that does not answer) keeps its
locks until that thread wakes up, though none of its program runs any more. Such a lock is taken over: its file is
replaced by a new one, which the new holder has locked already. Locks are taken and files replaced by one process at a
time (`_alone`), so nobody gets the lock of a file that has just been replaced.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from backupcore import inherited, process
from backupcore.errors import BackupError, Busy, ContractViolation, from_os_error
from backupcore.model import VM, Image
from backupcore.small_file import NotAFile, require_file
from backupcore.typed import typed
from vmkeep import full_state

__all__ = ["Holder", "holder", "image_exclusive", "image_read", "image_shared", "is_lost", "still_held", "vm_run"]

log = logging.getLogger("vmkeep.lock")

_LENGTH = 4096  # bytes; the name of a VM has 200 at most, and JSON writes one letter in twelve
_own: dict[str, tuple[int, str]] = {}
"""The descriptor of each VM's lock that this process has, and what it is open to, by the VM's UUID."""
_ALONE_LIMIT = 5.0  # seconds; whoever is alone with the locks is so for less than a millisecond


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds the lock of a VM: the process, since when, what it does, and the lock's file.

    `dying`: it was killed and cannot end; whoever wants the lock gets it.
    """

    vm: VM
    process: int
    since: datetime
    doing: str
    path: Path
    dying: bool = False


def _folder(state: Path) -> Path:
    folder = state / "locks"
    try:
        state.mkdir(mode=0o711, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise full_state.from_os_error(error, f"the lock folder {folder}", state) from error
    return folder


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Be the only one that takes locks or replaces their files. Busy if somebody is stopped in the middle of that."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    deadline = time.monotonic() + _ALONE_LIMIT
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    others = process.holders(handle)
                    who = ", ".join(map(str, process.hangs(others) or sorted(others))) or "which one is not shown here"
                    raise Busy(
                        f"the locks in {folder} are held by another vmkeep: {who}", "End it, then run this again."
                    ) from None
                time.sleep(0.005)
        yield
    finally:
        os.close(handle)


def _take(state: Path, name: str, how: int) -> tuple[int, bool]:
    """An open lock file, and whether this process has got its lock. OSErrors are those of the taxonomy."""
    folder = _folder(state)
    path = folder / name
    try:
        with _alone(folder):
            require_file(path)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(handle, how | fcntl.LOCK_NB)
            except BlockingIOError:
                if not process.held_by_the_dying(handle):
                    return handle, False
                log.warning("%s", _taken_over(handle))
                os.close(handle)
                return inherited.keep_from_children(_replaced(path, how)), True
            return inherited.keep_from_children(handle), True
    except OSError as error:
        raise full_state.from_os_error(error, f"the lock {path}", state) from error


def _replaced(path: Path, how: int) -> int:
    """A new file in the place of a lock's, locked before it has that name."""
    new = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}")
    new.unlink(missing_ok=True)
    handle = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
        new.rename(path)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _taken_over(handle: int) -> str:
    """What is said of a lock that is taken over: which process had it, and why that has not ended."""
    had = process.holders(handle)
    why = "; ".join(str(hung) for hung in process.hangs(had)) or f"process {min(had, default=0)} was killed"
    return f"the lock of a dead run is taken over: {why}"


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
    folder = state / "locks"
    with ExitStack() as stack:
        # A look locks a file for a moment, in which whoever wants it would be told that it is busy.
        with suppress(Busy, FileNotFoundError):
            stack.enter_context(_alone(folder))
        for path in sorted(folder.glob("vm-*")):
            try:
                require_file(path)
                handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # the state folder may be read-only
            except NotAFile as error:
                # Another VM's, as far as can be known; whoever wants that lock is told.
                log.warning("the lock %s: %s", path, error.strerror)
                continue
            except OSError as error:
                raise from_os_error(error, "a lock") from error
            try:
                found = _read(handle, path)
                if found and reference in (found.vm.name, found.vm.uuid) and _locked(handle):
                    return replace(found, dying=process.held_by_the_dying(handle))
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
    handle, got = _take(state, name, fcntl.LOCK_EX)
    try:
        if not got:
            raise _busy(vm, _read(handle, state / "locks" / name))
        _enter(handle, state, doing, vm={"uuid": vm.uuid, "name": vm.name})
        _own[vm.uuid] = handle, _opened(handle)
        yield
        if _is(handle, state / "locks" / name):
            os.ftruncate(handle, 0)
    finally:
        _own.pop(vm.uuid, None)
        _close(handle, state / "locks" / name)


def is_lost(vm: VM) -> bool:
    """Whether somebody has closed the descriptor of the lock that `vm_run` holds in this process.

    Opens nothing, and asks no file system, which may hang.
    """
    held = _own.get(vm.uuid)
    # Asked again: it may have been given back between the two.
    return held is not None and _opened(held[0]) != held[1] and _own.get(vm.uuid) is held


def _opened(handle: int) -> str:
    """What a descriptor is open to, as the kernel knows it by itself: mount and, since Linux 5.14, inode."""
    try:
        info = Path(f"/proc/self/fdinfo/{handle}").read_text()
    except OSError:
        return ""
    return " ".join(line for line in info.splitlines() if line.startswith(("mnt_id:", "ino:")))


def still_held(state: Path, vm: VM) -> None:
    """ContractViolation where the lock of `vm_run`, which this process has taken, was lost meanwhile.

    A plugin that closes descriptors which are not its own lets go of it, and another run may be at work.
    """
    path = state / "locks" / f"vm-{vm.uuid}"
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        held = _read(handle, path)
        if held is None or held.process != os.getpid() or not _locked(handle):
            raise ContractViolation(
                f"the lock of VM {vm.name} was lost while it was backed up: a plugin closes files that are not its own",
                "Nothing was recorded. Report it to the author of the driver, or of the site plugin.",
            )
    finally:
        os.close(handle)


def _is(handle: int, path: Path) -> bool:
    """Whether this descriptor is still what it was opened as, and not closed, or another file's by now."""
    try:
        found, wanted = os.fstat(handle), path.stat()
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino)


def _close(handle: int, path: Path) -> None:
    inherited.let_go(handle)
    if _is(handle, path):
        os.close(handle)


def _busy(vm: VM, other: Holder | None) -> Busy:
    if other is None:
        return Busy(f"a backup of VM {vm.name} is already running", "Wait for its end, then run it again.")
    hung = process.hang(other.process)
    if process.dying(other.process) and not process.locks_are_shown():
        return Busy(
            f"the lock of VM {vm.name} is held by a dead run: {hung or f'process {other.process} was killed'}",
            "It would be taken over where /proc/locks can be read: run this without ProcSubset=pid.",
        )
    what = f"{other.doing} of VM {vm.name} is already running"
    who = f"process {other.process}, since {other.since:%Y-%m-%d %H:%M:%S}"
    stop = f"stop it: {typed('vmkeep cancel', vm.name)}"
    if hung is None:
        return Busy(f"{what} ({who})", f"Wait for its end, then run it again; or {stop}")
    if hung.stopped:
        return Busy(f"{what} ({who}); it {hung.why}", f"Let it go on: kill -CONT {other.process}; or {stop}")
    return Busy(f"{what} ({who}); it {hung.why}", f"It goes on when that answers; or {stop}")


def _enter(handle: int, state: Path, doing: str, **more: object) -> None:
    """Write into a lock file who holds it."""
    entry = {"process": os.getpid(), "since": _now(), "doing": doing, **more}
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(entry).encode(), 0)
    except OSError as error:
        raise full_state.from_os_error(error, "a lock", state) from error


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


@contextmanager
def _image(state: Path, image: Image, how: int, doing: str = "") -> Iterator[None]:
    path = state / "locks" / f"image-{image.uuid}"
    handle, got = _take(state, path.name, how)
    try:
        if not got:
            raise Busy(
                f"image {image.number} is in use: {_doing(handle)}{_hanging(handle)}",
                "Wait for its end, then run it again.",
            )
        if doing:
            _enter(handle, state, doing)
        yield
        if doing and _is(handle, path):
            os.ftruncate(handle, 0)
    finally:
        _close(handle, path)


def _hanging(handle: int) -> str:
    return "".join(f"; {hung}" for hung in process.hangs(sorted(process.holders(handle))))


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
def image_read(state: Path, image: Image) -> Iterator[None]:
    """`image_shared` for what only reads; it goes on where the state folder is full or cannot be written to, too.

    Whoever else could delete the image meanwhile would have to write there, too.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(image_shared(state, image))
        except full_state.UNWRITABLE as error:
            _share_as_it_lies(state / "locks" / f"image-{image.uuid}", image, stack, error)
        yield


def _share_as_it_lies(path: Path, image: Image, stack: ExitStack, why: BackupError) -> None:
    try:
        require_file(path)
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        log.debug("image %d is read without a lock: %s", image.number, why)
        return
    stack.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Busy(
            f"image {image.number} is in use: {_doing(handle)}{_hanging(handle)}",
            "Wait for its end, then run it again.",
        ) from None


@contextmanager
def image_exclusive(state: Path, image: Image, doing: str = "it is being changed") -> Iterator[None]:
    """Be the only one that works on an image; `doing` tells others why they cannot. Busy at once."""
    with _image(state, image, fcntl.LOCK_EX, doing):
        yield
