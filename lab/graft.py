"""Let the lab's libvirtd see a file system that was mounted after its start: `python -m lab.graft FOLDER`.

A libvirtd below lab/keeper.py may live in a mount namespace of its own. Mounting the same kind of file system there
once more would make another one, with other files; so this very one is cloned and moved there. A process of its own
does it, since only a process with one thread can enter a mount namespace.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

from lab import libvirtd

# The numbers of these calls are the same on all architectures (Linux 5.2); glibc has no names for them before 2.36.
_OPEN_TREE, _MOVE_MOUNT = 428, 429
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH, _AT_FDCWD = 1, 4, -100
_CLONE_NEWNS = 0x20000


def mount_tmpfs(folder: Path, mebibytes: int) -> None:
    """Mount a tmpfs (mode 0711) at `folder`, also for the lab's libvirtd. VMs see it that start afterwards."""
    options = f"size={mebibytes}m,mode=711"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "lab", str(folder)], check=True)
    show(folder)


def show(folder: Path) -> None:
    """Let the lab's libvirtd see what is mounted at `folder` as well. VMs see it that start afterwards."""
    if libvirtd.started_here():
        subprocess.run([sys.executable, "-m", "lab.graft", str(folder)], check=True)


def unmount(folder: Path) -> None:
    """Undo `mount_tmpfs`, also while files in it are open."""
    command = ["umount", "--lazy", str(folder)]
    subprocess.run(command, check=True)
    keeper = libvirtd.keeper()
    if keeper is not None and _apart(keeper):
        subprocess.run(["nsenter", f"--mount=/proc/{keeper}/ns/mnt", *command], check=True)


def _graft(folder: str, keeper: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    tree = libc.syscall(_OPEN_TREE, _AT_FDCWD, folder.encode(), _OPEN_TREE_CLONE)
    _check(tree)
    namespace = os.open(f"/proc/{keeper}/ns/mnt", os.O_RDONLY)
    _check(libc.setns(namespace, _CLONE_NEWNS))
    _check(libc.syscall(_MOVE_MOUNT, tree, b"", _AT_FDCWD, folder.encode(), _MOVE_MOUNT_F_EMPTY_PATH))


def _apart(keeper: int) -> bool:
    return not Path(f"/proc/{keeper}/ns/mnt").samefile("/proc/self/ns/mnt")


def _check(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    found = libvirtd.keeper()
    if found is not None and _apart(found):
        _graft(sys.argv[1], found)
