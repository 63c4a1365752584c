"""Exchanging files of a powered-off VM for restored ones, each by one rename, all of them or none, also after a crash.

``swaps/<VM UUID>.json`` is the journal, there from before the first file is made until everything has followed. What a
crash leaves is settled by the next backup or by `vmkeep recover`: nothing swapped yet, the new files go; all or some
swapped, the rest follows.

In between nobody may start the VM, and whoever starts it after a power cut (libvirt's autostart, before anything of
ours runs) is not held up by a lock. So of several files one disk's name is taken away first, and given to its new file
last: a VM that lacks a disk does not start. Every other one always has its name: the old file gets a second one, then
the new file takes the first. Each step is on the disk before the next one begins.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from backupcore.errors import BackupError, HypervisorError, IntegrityError, from_os_error
from backupcore.model import VM
from backupcore.small_file import NotAFile, read_small
from backupcore.typed import typed

__all__ = ["Swap", "Swaps", "carry_out", "forget", "keep", "pending", "remark", "settle", "stamp", "write"]

NO_DISKS = ("nvram", "tpm")
"""What is exchanged beside the disks; the VM starts without it."""

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """One disk, or the firmware's variables ("nvram") or the TPM's state ("tpm"): `new` takes the place of `path`.

    The old file stays as `kept`, None where there was none. `old_stamp` and `new_stamp` tell the two files apart, and
    whether somebody has written to them since; see `stamp`. `needed` is whether the VM cannot start without it.
    """

    disk: str
    new: Path
    path: Path
    kept: Path | None
    old_stamp: str
    new_stamp: str
    needed: bool = True

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
    def gate(self) -> Swap | None:
        """The one that is missing for as long as the others are not all of one time; None where one rename does all.

        Chosen by what the journal says alone, so that it is the same one after a crash.
        """
        needed = sorted((swap for swap in self.disks if swap.needed), key=lambda swap: swap.kept is not None)
        return needed[0] if needed and len(self.disks) > 1 else None

    @property
    def reason(self) -> str:
        """Why the next backup is a full."""
        disks = [swap.disk for swap in self.disks if swap.disk not in NO_DISKS]
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
                    needed=one.get("needed", one["disk"] not in NO_DISKS),
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


def keep(folders: Iterable[Path]) -> None:
    """Have the new files, and the folders that they are in, on the disk under their names. OSErrors of the taxonomy."""
    for folder in folders:
        try:
            _sync(folder)
            _sync(folder.parent)
        except OSError as error:
            raise from_os_error(error, f"the folder {folder}") from error


def forget(state: Path, swaps: Swaps) -> None:
    """Remove the new files that were not put in their place, and the journal: all has followed, or is taken back."""
    for folder in swaps.folders:
        shutil.rmtree(folder, ignore_errors=True)
    path = _journal(state, swaps.vm)
    path.unlink(missing_ok=True)
    _sync(path.parent)


def carry_out(swaps: Swaps) -> None:
    """Do every rename that is not done yet."""
    gate = swaps.gate
    order = [swap for swap in swaps.disks if swap is not gate] + ([gate] if gate else [])
    if gate and not gate.done:
        _during(gate, _take_away)
    for swap in order:
        if not swap.done:
            _during(swap, _put)


def _during(swap: Swap, step: Callable[[Swap], None]) -> None:
    try:
        step(swap)
    except OSError as error:
        raise from_os_error(error, f"putting disk {swap.disk} in its place") from error


def _take_away(swap: Swap) -> None:
    if swap.kept is None or not swap.path.exists():
        return
    if _has_second_name(swap, swap.kept):  # a version that gave the old file one was cut off here
        swap.path.unlink()
        _sync(swap.path.parent)
    else:
        _rename(swap.path, swap.kept)


def _put(swap: Swap) -> None:
    if swap.kept is not None and not _has_second_name(swap, swap.kept):
        try:
            os.link(swap.path, swap.kept)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            swap.path.rename(swap.kept)  # the name is free for a moment, on file systems without hard links
        _sync(swap.path.parent)
    _rename(swap.new, swap.path)


def _has_second_name(swap: Swap, kept: Path) -> bool:
    """Whether the old file has its second name. FileExistsError where another file has come to it since it was free:
    the old one would be gone without it.
    """
    if not kept.exists():
        return False
    if swap.path.exists() and not kept.samefile(swap.path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(kept))
    return True


def _rename(old: Path, new: Path) -> None:
    old.rename(new)
    _sync(new.parent)


def settle(
    state: Path, vm: VM, held_off: Callable[[Sequence[Path]], AbstractContextManager[bool]]
) -> tuple[Swaps | None, str]:
    """Bring a restore in place that a crash has cut off to an end; what was done, or ``(None, "")``.

    The first is None where it was taken back, else what the caller has to let follow before `forget`. In the block of
    `held_off`, which says whether the VM is powered off, it cannot start on these files. HypervisorError where the VM
    runs, or has run, on some new and some old disks, or where files are gone.
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
        hindrance = _hindrance(swaps, off=off)
        if not hindrance:
            carry_out(swaps)
    if hindrance:
        new = ", ".join(swap.disk for swap in swaps.disks if swap.done) or "none"
        old = ", ".join(swap.disk for swap in left)
        raise HypervisorError(
            f"VM {vm.name}: a restore in place was cut off with {new} restored and {old} not, and cannot be finished: "
            f"{hindrance}",
            _way_out(swaps, _journal(state, vm)),
        )
    return swaps, f"finished a restore in place that was cut off: {swaps.reason}"


def _hindrance(swaps: Swaps, *, off: bool) -> str:
    """Why the rest cannot follow, or ""."""
    if not off:
        return "the VM runs, or another program has one of its disks open"
    for swap in swaps.disks:
        if not swap.done and not swap.new.exists():
            return f"the restored file of {swap.disk} is gone ({swap.new})"
        due = swap.new_stamp if swap.done else swap.old_stamp
        if swap.path.exists() and stamp(swap.path) != due:
            return f"{swap.path} was written to or exchanged since: has the VM run?"
    return ""


def _way_out(swaps: Swaps, journal: Path) -> str:
    back = [
        typed("mv", "-f", swap.kept, swap.path)
        for swap in swaps.disks
        if swap.kept is not None and swap.kept.exists() and (swap.done or not swap.path.exists())
    ]
    again = f"Power it off and restore it in place again: {typed('vmkeep restore', str(swaps.image), '--in-place')}"
    if not back:
        return f"{again}; or, where all its disks are as you want them, remove {journal}"
    return f"{again}; or put the old ones back: {'; '.join(back)}; then remove {journal}"


def remark(state: Path, vm: VM) -> str:
    """What to tell of a VM whose restore in place has not come to its end, or "". Read only."""
    try:
        swaps = pending(state, vm)
    except IntegrityError as error:
        return error.in_full
    except BackupError:
        return ""  # who may not read the state folder may list VMs all the same
    if swaps is None or not swaps.ready:  # what is not ready has touched nothing
        return ""
    left = [swap.disk for swap in swaps.disks if not swap.done]
    gate = swaps.gate
    lacks = f"; it lacks the file of disk {gate.disk}, so it cannot start" if gate and not gate.path.exists() else ""
    still = f", {', '.join(left)} not restored yet" if left else ""
    return (
        f"a restore in place (image {swaps.image}, increment {swaps.increment}) is under way, or was cut off{still}"
        f"{lacks}; unless it is under way, go on with: {typed('vmkeep recover', vm.name)}"
    )


def _take_back(left: Sequence[Swap]) -> None:
    for swap in left:
        if swap.kept is not None and swap.kept.exists() and swap.kept.samefile(swap.path):
            swap.kept.unlink()  # the second name of the file that stays


def _sync(folder: Path) -> None:
    """Have its names on the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
