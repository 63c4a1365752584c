"""Where the disks of a run are read: from the backup job of a VM that runs, or from `qemu-nbd` for one that is off."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from backupcore.context import Context
from backupcore.disk.nbd import Address
from backupcore.errors import BackupError, HypervisorError, IncrementImpossible
from backupcore.model import BackupRun
from backupcore_libvirt.backup_job import backup_xml, bitmap_name
from backupcore_libvirt.checkpoint import checkpoint_name, checkpoint_xml
from backupcore_libvirt.connection import CHECKPOINT_INCONSISTENT, NO_CHECKPOINT, Connection, Domain
from backupcore_libvirt.export import Export
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.libvirt_errors import code_of
from backupcore_libvirt.look import Look
from backupcore_libvirt.qemu_nbd import QemuNbd
from backupcore_libvirt.start_watch import StartWatch
from backupcore_libvirt.stopped import add_bitmaps

__all__ = ["hold_live", "hold_off"]


def hold_live(domain: Domain, run: BackupRun, folder: RunFolder, seen: Look) -> tuple[datetime, Mapping[str, Export]]:
    """The one call that fixes the instant of all disks: the instant in UTC, and the exports by disk ID.

    They are on the socket of the backup job, and live until that ends. IncrementImpossible, HypervisorError.
    """
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
    exports = {
        disk.id: Export(Address(str(folder.socket), disk.id), bitmap_name(disk.id) if disk.id in seen.bitmaps else None)
        for disk in seen.disks
    }
    return date, exports


def hold_off(
    connection: Connection, domain: Domain, run: BackupRun, seen: Look, *, folder: RunFolder, ctx: Context
) -> tuple[datetime, Mapping[str, Export]]:
    """Begin to track the changes of a VM that is off, then serve its disks; the instant, and the exports by disk ID.

    From the first server on QEMU's lock keeps the VM off, so all disks show one instant; where one is a block device
    the run is given up if the VM starts. The bitmaps come before, since a served image cannot be written to; what is
    written in between is in the export and again in the next increment. Busy where the VM has been started meanwhile.
    The servers live until the end of `ctx`, or `end_stray`.
    """
    if any(disk.kind == "block" for disk in seen.disks):
        StartWatch(connection.uri, domain.uuid, domain.name, folder, ctx).begin()
    add_bitmaps([disk for disk in seen.disks if disk.id in seen.tracked], checkpoint_name(run.point))
    exports = {}
    for disk in seen.disks:
        ctx.check()
        bitmap = seen.bitmaps.get(disk.id)
        server = QemuNbd(folder.socket_of(disk.id), disk.path, disk.format, bitmaps=[bitmap] if bitmap else [])
        ctx.stack.enter_context(server)
        exports[disk.id] = Export(server.address, bitmap)
    return datetime.now(UTC), exports
