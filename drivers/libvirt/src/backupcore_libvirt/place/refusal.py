"""What QEMU was refused as a backup job began: the path, and what lets it through."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from backupcore.errors import BackupError, HypervisorError
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.place.confinement import remedy

__all__ = ["refused"]


def refused(error: BackupError, folder: RunFolder, socket: Path, models: Collection[str]) -> BackupError:
    """The error of a call that begins a backup job, with its remedy where it is known.

    `models` are the security models under which libvirt runs VMs.
    """
    if "permission denied" in error.message.lower():
        path = str(socket if "socket" in error.message else folder.path)
        where = "" if path in error.message else f" (QEMU could not use {path})"
        return HypervisorError(f"{error.message}{where}", remedy(models, folder.scratch))
    if "No such file or directory" in error.message and str(folder.path) in error.message:
        # QEMU lives in a mount namespace of its own, made when the VM started.
        return HypervisorError(
            f"{error.message} (the folder exists, but QEMU does not see it)",
            f"If a file system was mounted at {folder.scratch} after the VM had started, restart the VM, or set "
            "'scratch' in the configuration to another folder.",
        )
    return error
