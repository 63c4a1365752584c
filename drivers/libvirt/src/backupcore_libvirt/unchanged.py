"""What tracks the changes of a VM's disks, asked for what has not changed: for a comparison with the backups."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from backupcore.context import Context
from backupcore.disk.reader import Reader
from backupcore.errors import IncrementImpossible
from backupcore.hypervisor import Unchanged
from backupcore.model import BackupRun
from backupcore_libvirt.checkpoint import Since
from backupcore_libvirt.connection import Connection, Domain
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.look import Look
from backupcore_libvirt.mechanisms.choice import choose
from backupcore_libvirt.reading.ended import job_expected
from backupcore_libvirt.reading.export import Export
from backupcore_libvirt.reading.process import reader_of
from backupcore_libvirt.reading.since import unchanged_of
from backupcore_libvirt.release.guard import Guard

__all__ = ["hold_unchanged"]


def hold_unchanged(
    connection: Connection,
    domain: Domain,
    run: BackupRun,
    disks: Collection[str],
    *,
    scratch: Path,
    guard: Guard,
    ctx: Context,
) -> tuple[Unchanged, ...]:
    """Hold one instant of `disks`, as a backup does that makes no checkpoint, and ask their bitmaps.

    The exports live until the job is ended, or the end of `ctx`. IncrementImpossible where no bitmap tells of any disk.
    """
    run = replace(run, tracked=False, settings={**run.settings, "FS_FREEZE": "NONE"})
    folder = RunFolder(scratch, run.id)
    mechanism = choose(connection, domain, run, scratch, ctx)
    seen = mechanism.look
    assert seen.since is not None  # the run has a parent
    why_not = {disk: _why_not(disk, seen, seen.since) for disk in disks if disk not in seen.since.changed}
    chosen = tuple(disk for disk in seen.disks if disk.id in disks and disk.id not in why_not)
    if not chosen:
        raise IncrementImpossible("; ".join(f"disk {disk}: {why}" for disk, why in why_not.items()))
    mechanism = mechanism.narrowed(tuple(disk.id for disk in chosen))
    lock = folder.make(seen.owner, domain.uuid)
    ctx.stack.callback(os.close, lock)
    ctx.check()
    mechanism.ready(guard)
    mechanism.begin()
    exports = mechanism.serve(guard)
    reader = reader_of(guard, ctx)
    with job_expected(domain, folder, exports, ctx):
        found = {disk.id: _unchanged(disk.id, exports[disk.id], reader) for disk in chosen}
    return tuple(found.get(disk) or Unchanged(id=disk, why_not=why_not[disk]) for disk in disks)


def _why_not(disk: str, seen: Look, since: Since) -> str:
    if disk in since.whole:
        return since.whole[disk]
    left_out = {left.id: left.reason for left in seen.left_out}
    return left_out.get(disk, "the VM has no such disk any more")


def _unchanged(disk: str, export: Export, reader: Reader) -> Unchanged:
    assert export.bitmap is not None
    size, extents = reader.call(unchanged_of, export.address, export.bitmap)
    return Unchanged(id=disk, virtual_size=size, extents=extents, blocks=reader.blocks(export.address))
