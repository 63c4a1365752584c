"""Putting right what dead runs left of a VM, whatever is known of them: found by looking, so it can be repeated."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from backupcore.context import Context
from backupcore.errors import BackupError, Busy
from backupcore.model import VM, new_id
from backupcore_libvirt import checkpoint, freeze_record
from backupcore_libvirt.backup_job import end, left_behind
from backupcore_libvirt.connection import Connection, Domain
from backupcore_libvirt.folder import RunFolder, dead_folders
from backupcore_libvirt.freeze import release_dead
from backupcore_libvirt.mechanisms.choice import finish
from backupcore_libvirt.release.servers import end_stray

__all__ = ["clear", "recover"]


def recover(
    connection: Connection,
    domain: Domain | None,
    vm: VM,
    scratch: Path,
    *,
    spent: Collection[str],
    installation: str,
    ctx: Context,
) -> None:
    """End dead runs' job, let the guest go on, bring its disks to rest, remove their folders, and checkpoints of the
    points in `spent`.

    Only overlays of `installation` are merged. `domain` is None for a VM that is gone: only folders can be left of it.
    While a job runs that is no dead run's, the VM is left alone.
    """
    if domain is None:
        # Nothing of it runs any more, whatever a record of the freeze says.
        for folder in dead_folders(scratch, vm.uuid):
            freeze_record.remove(folder)
            _remove(folder, ctx)
        return
    errors = release_dead(domain, scratch, ctx)
    try:
        _free(domain, scratch, ctx)
    except Busy as busy:
        ctx.log.info("%s", busy)
        spent = ()
    try:
        # First: while a disk lies on an overlay its bitmaps are in two files, and one of them cannot be written to.
        finish(connection, domain, RunFolder(scratch, new_id()), ctx, installation)
    except BackupError as error:
        errors.append(error)
    for name in checkpoint.delete(domain, spent) if spent else ():
        ctx.did(f"deleted checkpoint {name}, which no backup needs")
    if errors:
        raise errors[0]


def clear(domain: Domain, scratch: Path, ctx: Context) -> None:
    """Make the VM free for a backup, and say in the log what that took.

    Busy where a job runs that is no dead run's. A guest that cannot be let go on is logged: a backup may still work.
    """
    for error in release_dead(domain, scratch, ctx):
        ctx.log.warning("%s", error.in_full)
    _free(domain, scratch, ctx)
    for line in ctx.put_right:
        ctx.log.warning("VM %s: %s", domain.name, line)


def _free(domain: Domain, scratch: Path, ctx: Context) -> None:
    """End dead runs' job and remove their folders. Busy where a job runs that is no dead run's.

    HypervisorError where the job cannot be ended without harm, or is one that libvirt itself cannot get rid of.
    """
    dead = left_behind(domain, scratch)
    folders = dead_folders(scratch, domain.uuid)
    if dead is not None and dead.path not in [folder.path for folder in folders]:
        folders.append(dead)
    for folder in folders:
        for line in end(domain, folder):
            ctx.did(f"{line}; a dead run ({folder.run}) had left it so")
        _remove(folder, ctx)


def _remove(folder: RunFolder, ctx: Context) -> None:
    if end_stray(folder.path):
        ctx.did(f"ended the qemu-nbd of a dead run ({folder.run})")
    if strange := folder.remove():
        ctx.log.warning("%s holds what no run puts there, and stays: %s", folder.path, ", ".join(strange))
    else:
        ctx.did(f"removed {folder.path} (socket and scratch files of a dead run)")
