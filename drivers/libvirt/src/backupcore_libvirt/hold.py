"""Where the disks of a run are read: from the backup job of a VM that runs, or from `qemu-nbd` for one that is off."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from backupcore.context import Context
from backupcore.disk.nbd import Address
from backupcore.model import BackupRun
from backupcore_libvirt.backup_job import bitmap_name
from backupcore_libvirt.checkpoint import checkpoint_name
from backupcore_libvirt.export import Export
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.look import Look
from backupcore_libvirt.qemu_nbd import QemuNbd
from backupcore_libvirt.stopped import add_bitmaps

__all__ = ["hold", "live_exports"]


def live_exports(folder: RunFolder, seen: Look) -> Mapping[str, Export]:
    """By disk ID: one export each on the socket of the backup job."""
    return {
        disk.id: Export(Address(str(folder.socket), disk.id), bitmap_name(disk.id) if disk.id in seen.bitmaps else None)
        for disk in seen.disks
    }


def hold(run: BackupRun, folder: RunFolder, seen: Look, ctx: Context) -> tuple[datetime, Mapping[str, Export]]:
    """Begin to track the changes of a VM that is off, then serve its disks; the instant, and the exports by disk ID.

    From the first server on QEMU's lock keeps the VM off, so all disks show one instant. The bitmaps come before, since
    a served image cannot be written to; what is written in between is in the export and again in the next increment.
    Busy where the VM has been started meanwhile. The servers live until the end of `ctx`, or `end_stray`.
    """
    add_bitmaps([disk for disk in seen.disks if disk.id in seen.tracked], checkpoint_name(run.point))
    exports = {}
    for disk in seen.disks:
        ctx.check()
        bitmap = seen.bitmaps.get(disk.id)
        server = QemuNbd(folder.socket_of(disk.id), disk.path, disk.format, bitmaps=[bitmap] if bitmap else [])
        ctx.stack.enter_context(server)
        exports[disk.id] = Export(server.address, bitmap)
    return datetime.now(UTC), exports
