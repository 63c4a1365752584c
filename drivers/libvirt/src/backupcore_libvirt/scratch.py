"""The scratch folder: whether QEMU's user can reach it, and the room in it that a run leaves alone."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from backupcore.errors import AccessDenied, HypervisorError, TargetFull
from backupcore.typed import typed

__all__ = ["Owner", "check_scratch", "require_room", "reserve", "scratch_room"]


@dataclass(frozen=True, slots=True)
class Owner:
    """The user that QEMU runs as."""

    uid: int
    gid: int

    def __str__(self) -> str:
        try:
            return f"user {pwd.getpwuid(self.uid).pw_name} (uid {self.uid})"
        except KeyError:
            return f"uid {self.uid}"

    def may(self, mode: str, path: Path) -> bool:
        """Whether this user may read ("r"), write ("w") or pass ("x") `path`: asked of the kernel, so ACLs count.

        An ordinary user can only ask for itself; for others the answer is then False.
        """
        if self.uid == os.geteuid():
            return os.access(path, {"r": os.R_OK, "w": os.W_OK, "x": os.X_OK}[mode])
        if os.geteuid() != 0:
            return False
        try:
            groups = os.getgrouplist(pwd.getpwuid(self.uid).pw_name, self.gid)
        except KeyError:
            groups = [self.gid]
        command = ["test", f"-{mode}", str(path)]
        try:
            done = subprocess.run(command, user=self.uid, group=self.gid, extra_groups=groups, check=False)
        except OSError as error:
            raise HypervisorError(
                f"whether {self} reaches {path} cannot be tried: the program 'test' could not be run: {error.strerror}",
                "Is /usr/bin in PATH, and another process allowed (ulimit -u)?",
            ) from error
        return done.returncode == 0


def check_scratch(scratch: Path, owner: Owner) -> None:
    """That `owner` can reach the scratch folder, or as much of its path as exists. AccessDenied says what hinders it.

    Touches nothing.
    """
    if owner.uid != os.geteuid() and os.geteuid() != 0:
        raise AccessDenied(
            f"QEMU runs as {owner}, and only root can hand a folder over to it",
            "Run it as root, or keep the VM in qemu:///session.",
        )
    way = list(itertools.takewhile(Path.exists, reversed([scratch, *scratch.parents])))
    for folder in way:
        if not folder.is_dir():
            raise AccessDenied(f"{folder}, on the way to the scratch folder {scratch}, is no folder")
    # The last one can only be passed by a user who can pass all above it; each question is a process.
    if owner.may("x", way[-1]):
        return
    for folder in way:
        if not owner.may("x", folder):
            raise AccessDenied(
                f"QEMU runs as {owner} and cannot pass {folder}, on the way to the scratch folder {scratch}",
                f"Let it pass: {typed('chmod o+x', folder)}; or set 'scratch' in the configuration to another folder.",
            )


def reserve(total: int) -> int:
    """Bytes of a scratch file system of `total` bytes that a run never uses: a tenth of it, at most 256 MiB.

    QEMU 7.2 stops the guest when a scratch file cannot grow, so a run gives up here, before that.
    """
    return min(total // 10, 256 << 20)


def scratch_room(scratch: Path) -> tuple[int, int]:
    """(bytes free, the reserve) of the file system that holds the scratch folder, or would hold it."""
    there = next(folder for folder in (scratch, *scratch.parents) if folder.exists())
    usage = shutil.disk_usage(there)
    return usage.free, reserve(usage.total)


def require_room(scratch: Path, extra: int = 0) -> None:
    """TargetFull unless twice the reserve, and `extra` bytes beyond it, are free for scratch."""
    free, kept = scratch_room(scratch)
    if free < kept * 2 + extra:
        raise TargetFull(
            f"scratch folder {scratch}: {free >> 20} MiB are free, {(kept * 2 + extra) >> 20} MiB are needed to begin",
            "Make room there, or set 'scratch' in the configuration to another folder.",
        )
