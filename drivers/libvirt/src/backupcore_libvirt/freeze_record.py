"""What says on disk that a run has asked a guest to stand still: ``SCRATCH/RUN/freeze``.

It is written, and synced, before anything is asked, and goes only when the guest has been seen to go on. So whoever
finds it knows that a guest may stand still because of us, and how to let it go; a folder that holds one stays.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from backupcore.errors import HypervisorError, from_os_error
from backupcore_libvirt.folder import RunFolder

__all__ = ["FreezeRecord", "How", "read", "remove", "write"]

How = Literal["AGENT", "SUSPEND"]
_LIMIT = 4096
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class FreezeRecord:
    """How the VM was asked (its UUID), and in which of its lives: libvirt's number of the running VM, and the host's
    boot, since those numbers begin again with it.
    """

    how: How
    vm: str
    number: int
    boot: str

    @classmethod
    def now(cls, how: How, vm: str, number: int) -> FreezeRecord:
        """A record of this boot of the host. HypervisorError where that cannot be told from another one."""
        try:
            boot = _BOOT.read_text().strip()
        except OSError as error:
            raise HypervisorError(
                f"a freeze of the guest cannot be put down: {_BOOT} cannot be read ({error.strerror})",
                "In a unit with ProcSubset=pid it is not there: take that line out, or choose FS_FREEZE=NONE.",
            ) from error
        return cls(how, vm, number, boot)


def _path(folder: RunFolder) -> Path:
    return folder.path / "freeze"


def write(folder: RunFolder, record: FreezeRecord) -> None:
    """Put it down so that it survives whatever comes next. AccessDenied, TargetFull."""
    text = json.dumps({"how": record.how, "vm": record.vm, "number": record.number, "boot": record.boot})
    try:
        # The folder belongs to QEMU's user: what it could have put there must not be followed.
        handle = os.open(_path(folder), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        _sync(folder.path)
    except OSError as error:
        raise from_os_error(error, f"the record of the freeze in {folder.path}") from error


def read(folder: RunFolder) -> FreezeRecord | None:
    """The record of this folder; None if there is none, or none of ours."""
    try:
        with os.fdopen(os.open(_path(folder), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)) as file:
            if os.fstat(file.fileno()).st_uid != os.geteuid():
                return None  # QEMU's user put it there
            found = json.loads(file.read(_LIMIT))
        if found["how"] not in ("AGENT", "SUSPEND"):
            return None
        return FreezeRecord(cast("How", found["how"]), str(found["vm"]), int(found["number"]), str(found["boot"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def remove(folder: RunFolder) -> None:
    """Forget it: the guest goes on. Harmless if it is gone."""
    with suppress(FileNotFoundError):
        _path(folder).unlink()
    with suppress(FileNotFoundError):
        _sync(folder.path)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
