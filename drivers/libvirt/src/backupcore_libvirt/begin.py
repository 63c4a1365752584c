"""The one call that fixes the instant of all disks of a running VM."""

from __future__ import annotations

from datetime import UTC, datetime

from backupcore.errors import BackupError, HypervisorError, IncrementImpossible
from backupcore.model import BackupRun
from backupcore_libvirt.backup_job import backup_xml
from backupcore_libvirt.checkpoint import checkpoint_xml
from backupcore_libvirt.connection import CHECKPOINT_INCONSISTENT, NO_CHECKPOINT, Domain, code_of
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.look import Look

__all__ = ["begin"]


def begin(domain: Domain, run: BackupRun, folder: RunFolder, seen: Look) -> datetime:
    """The one call that fixes the instant of all disks; the instant in UTC."""
    job = backup_xml([disk.id for disk in seen.disks], folder, seen.bitmaps)
    points = checkpoint_xml(run.point, seen.all_disks, seen.tracked)
    date = datetime.now(UTC)
    try:
        domain.begin_backup(job, points)
    except BackupError as error:
        if run.parent is not None and code_of(error) in (CHECKPOINT_INCONSISTENT, NO_CHECKPOINT):
            # libvirt says so before it starts anything.
            raise IncrementImpossible(error.message) from error
        if "permission denied" in error.message.lower():
            raise HypervisorError(
                f"{error.message} (QEMU could not use {folder.path})",
                "Is QEMU confined by AppArmor or SELinux? The scratch folder must be allowed there too.",
            ) from error
        if "No such file or directory" in error.message and str(folder.path) in error.message:
            # QEMU lives in a mount namespace of its own, made when the VM started.
            raise HypervisorError(
                f"{error.message} (the folder exists, but QEMU does not see it)",
                f"If a file system was mounted at {folder.scratch} after the VM had started, restart the VM, or set "
                "'scratch' in the configuration to another folder.",
            ) from error
        raise
    return date
