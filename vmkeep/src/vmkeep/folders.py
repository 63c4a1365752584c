"""The private folder of a run, and what dead runs left of theirs.

``runs/<run ID>`` holds ``lock``, flocked as long as its process lives, and for a backup ``run.json``: enough to release
in a fresh process what that run held.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

from backupcore import inherited, process
from backupcore.errors import BackupError, ContractViolation, from_os_error
from backupcore.guard import SOCKET
from backupcore.model import VM, BackupRun, Disk, Link, SourceRef, Type, new_id
from backupcore.small_file import read_small, require_file
from vmkeep import full_state

__all__ = ["RECORD_LIMIT", "dead", "dead_runs", "dump_run", "keep", "load_run", "of", "own", "sweep"]

log = logging.getLogger("vmkeep.folders")

RECORD_LIMIT = 16 << 20
"""Bytes of a run's record: some 10 KB for each of its disks."""

_GRACE = 600  # seconds; a folder without a lock file is being made, unless it is older than this


@contextmanager
def own(state: Path, run: BackupRun | None = None, *, stays: Callable[[], bool] = lambda: False) -> Iterator[Path]:
    """A new private folder for `run`, or for another verb that needs one. Removed at the end, whatever happens.

    Where it `stays`, it is a dead run's for whoever comes next: what that run has stored is recorded then. A verb that
    is no backup gets one for temporary files instead where the state folder is not there, full, or cannot be written
    to.
    """
    try:
        if run is None:
            full_state.require_room(state)
        folder, handle = _made(state, run)
    except (*full_state.UNWRITABLE, FileNotFoundError) as error:
        if run is not None:
            raise
        log.debug("a folder for temporary files stands in for one of the state folder: %s", error)
        with _elsewhere(error) as folder:
            yield folder
        return
    opened = os.fstat(handle)
    try:
        if run:
            keep(folder, "run.json", dump_run(run))
        yield folder
    finally:
        # Before the lock is given back: whoever sweeps must not find it dead. But NFS and FUSE keep an open file,
        # under another name, and with it the folder.
        removed = stays() or _remove(folder, again=True)
        inherited.let_go(handle)
        with suppress(OSError):  # a plugin may have closed it, and the number may be another file's by now
            if os.path.samestat(os.fstat(handle), opened):
                os.close(handle)
        if not removed:
            _remove(folder)


def _made(state: Path, run: BackupRun | None) -> tuple[Path, int]:
    """The folder, and the descriptor of its lock."""
    runs = state / "runs"
    folder = runs / (run.id if run else new_id())
    try:
        state.mkdir(mode=0o711, parents=True, exist_ok=True)
        runs.mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(mode=0o700)
        try:
            handle = _locked(folder)
        except OSError:  # only now is the folder ours to remove
            with suppress(OSError):
                shutil.rmtree(folder)
            raise
    except OSError as error:
        raise full_state.from_os_error(error, f"the folder of runs {runs}", state) from error
    return folder, inherited.keep_from_children(handle)


def _locked(folder: Path) -> int:
    """The descriptor of its lock. It gets its name when it is locked: who sweeps must not find it free in between."""
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        (folder / ".lock").rename(folder / "lock")
    except OSError:
        os.close(handle)
        raise
    return handle


@contextmanager
def _elsewhere(why: Exception) -> Iterator[Path]:
    try:
        folder = tempfile.mkdtemp(prefix="vmkeep-")
    except OSError as error:
        raise from_os_error(error, f"a folder for temporary files, since {why}") from error
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def keep(folder: Path, name: str, text: str) -> None:
    """Write a file of a run's folder, whole or not at all."""
    temporary = folder / f".{name}"
    try:
        temporary.write_text(text)
        temporary.rename(folder / name)
    except OSError as error:
        raise full_state.from_os_error(error, f"the run's folder {folder}", folder.parent.parent) from error


def sweep(
    state: Path, vm: VM, release: Callable[[BackupRun, Path], None], did: list[str], errors: list[BackupError]
) -> None:
    """Clear away the folders of dead runs of `vm`, and of dead verbs that were no backup. The caller has the VM's lock.

    `release` is called for each backup among them, with its folder, before that goes. What it raises is added to
    `errors`: the next run tries again. What was cleared away is added to `did`.
    """
    for folder in _dead_folders(state):
        record = folder / "run.json"
        run = _load(record)
        if run is None and record.exists():
            continue
        if run is not None and run.vm.uuid != vm.uuid:
            continue
        did += _end_orphans(folder)
        if run is None:
            if _remove(folder):
                did.append(f"removed {folder}, left by a command that was killed")
            continue
        try:
            release(run, folder)
        except Exception as error:  # noqa: BLE001 - the plugins' errors; the new run must go on, and says what is wrong
            log.info("what run %s left behind could not be released: %s", run.id, error)
            errors.append(error if isinstance(error, BackupError) else ContractViolation(str(error)))
            continue
        _remove(folder)


def dead_runs(state: Path) -> list[BackupRun]:
    """The backups that were killed and whose folders are still there."""
    found = (_load(folder / "run.json") for folder in _dead_folders(state))
    return [run for run in found if run is not None]


def of(state: Path, vm: VM) -> list[Path]:
    """The folders of the runs of a VM, living or dead."""
    found = ((folder, _load(folder / "run.json")) for folder in sorted((state / "runs").glob("*")))
    return [folder for folder, run in found if run is not None and run.vm.uuid == vm.uuid]


def dead(state: Path, vm: VM) -> list[Path]:
    """The folders of the dead runs of a VM."""
    return [folder for folder in of(state, vm) if _dead(folder)]


def _dead_folders(state: Path) -> list[Path]:
    return [folder for folder in sorted((state / "runs").glob("*")) if _dead(folder)]


def _load(record: Path) -> BackupRun | None:
    try:
        return load_run(read_small(record, RECORD_LIMIT).decode())
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        log.warning("%s cannot be read (%s); it is left alone", record, type(error).__name__)
        return None


def _end_orphans(folder: Path) -> list[str]:
    """End the processes that a dead run has left: those that work in its folder, or are still its children.

    A line for each. They end with their parent; one that hung in a read of the run's view at that moment may not have,
    and a parent that was killed and cannot end keeps them. What guards the guest is not ended while it is at work.
    """
    left = set() if (folder / SOCKET).exists() else _children(folder)
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if not _is_orphan(place, folder, left):
                continue
            handle = os.pidfd_open(int(place.name))
        except OSError:
            continue  # it has ended, or is another user's
        try:
            # Asked again now that its number cannot go to another process unnoticed.
            if _is_orphan(place, folder, left) and not process.dying(int(place.name)):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                found.append(f"ended process {place.name}, which a dead run had left")
        except OSError:
            continue
        finally:
            os.close(handle)
    return found


def _is_orphan(place: Path, folder: Path, left: set[int]) -> bool:
    return int(place.name) in left or (place / "cwd").readlink().is_relative_to(folder)


def _children(folder: Path) -> set[int]:
    """The processes that the owner of this folder has started, where it was killed and cannot end."""
    try:
        require_file(folder / "lock")
        handle = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return set()
    try:
        owners = [owner for owner in process.holders(handle) if process.dying(owner)]
    finally:
        os.close(handle)
    return {child for owner in owners for child in process.children(owner)}


def _dead(folder: Path) -> bool:
    try:
        require_file(folder / "lock")
        try:
            handle = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)  # an NFS server locks what can be written to
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            handle = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return _old(folder)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return process.held_by_the_dying(handle)  # killed, and none of its program runs any more
    finally:
        os.close(handle)
    return True


def _old(folder: Path) -> bool:
    try:
        return time.time() - folder.lstat().st_mtime > _GRACE
    except FileNotFoundError:
        return False  # its run has ended meanwhile


def _remove(folder: Path, *, again: bool = False) -> bool:
    """Whether it was removed by this call. Why it could not be is logged, unless it is tried `again`."""
    # A view's process that was killed leaves a dead mount behind, and one that hangs a live one.
    for place in _mounts_below(folder):
        unmount = ["umount", "-l", place] if os.geteuid() == 0 else ["fusermount3", "-u", "-z", place]
        try:
            subprocess.run(unmount, check=True, capture_output=True, timeout=30)
        except (OSError, subprocess.SubprocessError):
            log.warning("%s is still mounted; its run's folder stays until the next run", place)
            return False
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return False
    except OSError as error:
        if not again:
            log.warning("the folder of a run could not be removed: %s", error)
        return False
    return True


def _mounts_below(folder: Path) -> list[str]:
    found = []
    for line in Path("/proc/self/mounts").read_text(errors="surrogateescape").splitlines():
        place = line.split(" ")[1].encode("utf-8", "surrogateescape").decode("unicode_escape")
        if place.startswith(f"{folder}/"):
            found.append(place)
    return sorted(found, reverse=True)


_COMPOUND = {"vm", "type", "parent", "builds_on", "spent", "keep", "settings", "date"}
_SIMPLE = {f.name for f in fields(BackupRun)} - _COMPOUND


def dump_run(run: BackupRun) -> str:
    """A run as JSON."""
    parent = run.parent
    return json.dumps(
        {
            **{name: getattr(run, name) for name in sorted(_SIMPLE)},
            "vm": {"uuid": run.vm.uuid, "name": run.vm.name},
            "type": run.type.value,
            "parent": parent
            and {
                "point": parent.point,
                "digest": parent.digest,
                "disks": [{f.name: getattr(disk, f.name) for f in fields(Disk)} for disk in parent.disks],
            },
            "builds_on": [source.token for source in run.builds_on],
            "spent": list(run.spent),
            "keep": None if run.keep is None else list(run.keep),
            "settings": dict(run.settings),
            "date": run.date.isoformat() if run.date else None,
        }
    )


def load_run(text: str) -> BackupRun:
    """The run that `dump_run` wrote. ValueError, KeyError or TypeError if it is none."""
    found: dict[str, Any] = json.loads(text)
    parent = found["parent"]
    return BackupRun(
        **{name: found[name] for name in _SIMPLE if name in found},
        vm=VM(**found["vm"]),
        type=Type(found["type"]),
        parent=parent
        and Link(point=parent["point"], digest=parent["digest"], disks=tuple(Disk(**disk) for disk in parent["disks"])),
        builds_on=tuple(SourceRef(token) for token in found["builds_on"]),
        spent=tuple(found["spent"]),
        keep=None if found.get("keep") is None else tuple(found["keep"]),
        settings=found["settings"],
        date=datetime.fromisoformat(found["date"]) if found["date"] else None,
    )
