"""Where the lab keeps things: .lab in the checkout, and a folder for VMs elsewhere (standard library only).

The checkout may lie below a folder that is closed to QEMU's user (/root, a home of mode 0700), and a deep checkout
makes socket paths longer than the 107 bytes that the kernel allows. So disks, consoles, sockets and scratch files of
the lab's VMs lie in a folder of their own below /var/tmp, which belongs to QEMU's user and is closed to everybody else.
Its name is recorded in .lab/vm-folder.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAB = ROOT / ".lab"
VM_FOLDER_PREFIX = "vmkeep-lab-"
_VM_FOLDER_RECORD = LAB / "vm-folder"


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold .lab/NAME.lock: test workers run side by side and share what the lab makes."""
    LAB.mkdir(exist_ok=True)
    with (LAB / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def vm_folder(owner: Callable[[], tuple[int, int]]) -> Path:
    """The folder for all VMs of this checkout, made on the first call; mode 0700, of QEMU's user.

    `owner` gives QEMU's uid and gid. It is asked only when the folder has to be made: libvirt may take seconds.
    """
    with locked("vm-folder"):
        recorded = recorded_vm_folder()
        if recorded is not None:
            return recorded
        folder = Path(tempfile.mkdtemp(prefix=VM_FOLDER_PREFIX, dir="/var/tmp"))  # mode 0700
        if os.geteuid() == 0:
            os.chown(folder, *owner())
        _VM_FOLDER_RECORD.write_text(f"{folder}\n")
        return folder


def recorded_vm_folder() -> Path | None:
    """The folder that an earlier call made; None where there is none, or where the record names something else."""
    if not _VM_FOLDER_RECORD.exists():
        return None
    folder = Path(_VM_FOLDER_RECORD.read_text().strip())
    # A record is only text: nothing but a folder of the lab's own naming is used, and later removed, on its word.
    if folder.parent != Path("/var/tmp") or not folder.name.startswith(VM_FOLDER_PREFIX) or not folder.is_dir():
        return None
    return folder
