"""Exchanging files of a powered-off VM for restored ones, each by one rename, all of them or none, also after a crash.

``swaps/<VM UUID>.json`` is the journal, there from before the first file is made until everything has followed. What a
crash leaves is settled by the next backup or by `vmkeep recover`: nothing swapped yet, the new files go; all or some
swapped, the rest follows. Where the VM has run on some new and some old disks only the user knows what he wants.

A disk always has its name: the old file gets a second one, then the new file takes the first.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from backupcore.errors import HypervisorError, IntegrityError, from_os_error
from backupcore.model import VM
from backupcore.small_file import NotAFile, read_small

__all__ = ["Swap", "Swaps", "carry_out", "forget", "pending", "settle", "stamp", "write"]

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """One disk, or the firmware's variables ("nvram"): `new` takes the place of `path`, whose file stays as `kept`.

    `kept` is None where there was none. `old_stamp` and `new_stamp` tell the two files apart, and whether somebody has
    written to them since; see `stamp`.
    """

    disk: str
    new: Path
    path: Path
    kept: Path | None
    old_stamp: str
    new_stamp: str

    @property
    def done(self) -> bool:
        """Whether the new file has taken its place: it and no other lies there now."""
        return stamp(self.path).split(" ")[0] == self.new_stamp.split(" ")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Swaps:
    """All disks of one restore in place. `ready` from when every new file is complete, checked and on the disk.

    The new files lie in folders of their own, beside the old ones, which go with what is left in them.
    """

    vm: VM
    image: int
    increment: int
    date: datetime
    disks: tuple[Swap, ...]
    ready: bool = False

    @property
    def folders(self) -> set[Path]:
        """Where the new files are made."""
        return {swap.new.parent for swap in self.disks}

    @property
    def reason(self) -> str:
        """Why the next backup is a full."""
        disks = [swap.disk for swap in self.disks if swap.disk != "nvram"]
        names = ", ".join(disks)
        one = "disk" if len(disks) == 1 else "disks"
        return (
            f"{one} {names} restored in place from image {self.image}, increment {self.increment}, "
            f"on {self.date:%Y-%m-%d %H:%M:%S}"
        )


def stamp(path: Path) -> str:
    """Which file this is, then what changes when somebody writes to it; "" if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return ""
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns}"


def _journal(state: Path, vm: VM) -> Path:
    return state / "swaps" / f"{vm.uuid}.json"


def write(state: Path, swaps: Swaps) -> None:
    """Write the journal: from here on what it says is settled after a crash."""
    path = _journal(state, swaps.vm)
    entry = {
        "vm": asdict(swaps.vm),
        "image": swaps.image,
        "increment": swaps.increment,
        "date": swaps.date.isoformat(),
        "ready": swaps.ready,
        "disks": [
            {key: str(value) if isinstance(value, Path) else value for key, value in asdict(swap).items()}
            for swap in swaps.disks
        ],
    }
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        _sync(state)
        temporary = path.with_suffix(".part")
        with temporary.open("w") as file:
            json.dump(entry, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        _sync(path.parent)
    except OSError as error:
        raise from_os_error(error, f"the journal {path}") from error


def pending(state: Path, vm: VM) -> Swaps | None:
    """The restore in place of this VM that has not come to its end. IntegrityError if its journal cannot be read."""
    path = _journal(state, vm)
    try:
        found = json.loads(read_small(path))
        return Swaps(
            vm=VM(**found["vm"]),
            image=int(found["image"]),
            increment=int(found["increment"]),
            date=datetime.fromisoformat(found["date"]),
            ready=bool(found["ready"]),
            disks=tuple(
                Swap(
                    disk=one["disk"],
                    new=Path(one["new"]),
                    path=Path(one["path"]),
                    kept=Path(one["kept"]) if one["kept"] else None,
                    old_stamp=one["old_stamp"],
                    new_stamp=one["new_stamp"],
                )
                for one in found["disks"]
            ),
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, NotAFile) as error:
        why = error.strerror if isinstance(error, NotAFile) else type(error).__name__
        raise IntegrityError(
            f"the journal {path} of a restore in place cannot be read ({why})",
            "Look at the VM's disks, then remove it.",
        ) from error
    except OSError as error:
        raise from_os_error(error, f"the journal {path}") from error


def forget(state: Path, swaps: Swaps) -> None:
    """Remove the new files that were not put in their place, and the journal: all has followed, or is taken back."""
    for folder in swaps.folders:
        shutil.rmtree(folder, ignore_errors=True)
    path = _journal(state, swaps.vm)
    path.unlink(missing_ok=True)
    _sync(path.parent)


def carry_out(swaps: Swaps) -> None:
    """Do every rename that is not done yet."""
    for swap in swaps.disks:
        try:
            _swap(swap)
        except OSError as error:
            raise from_os_error(error, f"putting disk {swap.disk} in its place") from error


def _swap(swap: Swap) -> None:
    if swap.done:
        return
    if swap.kept is not None and not swap.kept.exists():
        try:
            os.link(swap.path, swap.kept)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            swap.path.rename(swap.kept)  # the name is free for a moment, on file systems without hard links
        _sync(swap.path.parent)
    swap.new.rename(swap.path)
    _sync(swap.path.parent)


def settle(
    state: Path, vm: VM, held_off: Callable[[Sequence[Path]], AbstractContextManager[bool]]
) -> tuple[Swaps | None, str]:
    """Bring a restore in place that a crash has cut off to an end; what was done, or ``(None, "")``.

    The first is None where it was taken back, else what the caller has to let follow before `forget`. In the block of
    `held_off`, which says whether the VM is powered off, it cannot start on these files. HypervisorError where the VM
    runs, or has run, on some new and some old disks.
    """
    swaps = pending(state, vm)
    if swaps is None:
        return None, ""
    if not swaps.ready:
        forget(state, swaps)
        return None, "removed what a restore in place had written when it was cut off: the VM has its old disks"
    left = [swap for swap in swaps.disks if not swap.done]
    if not left:
        return swaps, f"finished a restore in place that was cut off: {swaps.reason}"
    if len(left) == len(swaps.disks) and all(swap.path.exists() or swap.kept is None for swap in left):
        _take_back(left)
        forget(state, swaps)
        return None, "took back a restore in place that was cut off before it began: the VM has its old disks"
    with held_off([swap.path for swap in left]) as off:
        ran = (
            not off
            or not all(swap.new.exists() for swap in left)
            or any(
                stamp(swap.path) != (swap.new_stamp if swap.done else swap.old_stamp)
                for swap in swaps.disks
                if swap.done or swap.path.exists()
            )
        )
        if not ran:
            carry_out(swaps)
    if ran:
        new = ", ".join(swap.disk for swap in swaps.disks if swap.done)
        old = ", ".join(swap.disk for swap in left)
        raise HypervisorError(
            f"VM {vm.name}: a restore in place was cut off, and the VM has run since with {new} restored and {old} not",
            "Power it off and restore it in place again, or put the old disks back: "
            + "; ".join(f"mv {swap.kept} {swap.path}" for swap in swaps.disks if swap.done and swap.kept)
            + f"; then remove {_journal(state, vm)}",
        )
    return swaps, f"finished a restore in place that was cut off: {swaps.reason}"


def _take_back(left: Sequence[Swap]) -> None:
    for swap in left:
        if swap.kept is not None and swap.kept.exists() and swap.kept.samefile(swap.path):
            swap.kept.unlink()  # the second name of the file that stays


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
