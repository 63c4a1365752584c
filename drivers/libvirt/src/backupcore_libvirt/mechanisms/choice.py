"""The one place that chooses how a VM is held, and that lets go of whatever holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from backupcore.context import Context
from backupcore.errors import BackupError
from backupcore.model import BackupRun, Outcome
from backupcore_libvirt import checkpoint
from backupcore_libvirt.connection import Connection, Domain
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.look import look
from backupcore_libvirt.mechanisms.live_job import LiveJob
from backupcore_libvirt.mechanisms.mechanism import Mechanism
from backupcore_libvirt.mechanisms.off_nbd import OffNbd
from backupcore_libvirt.mechanisms.overlays import Overlays
from backupcore_libvirt.overlay import run as overlay_run
from backupcore_libvirt.overlay.plan import plan, without_bitmaps
from backupcore_libvirt.place.job_socket import job_socket

__all__ = ["choose", "forget", "prepare", "settle"]


def prepare(connection: Connection, domain: Domain, run: BackupRun, folder: RunFolder, ctx: Context) -> None:
    """Put the VM's disks into the state in which a way can be chosen: finish what earlier runs have left of theirs.

    IncrementImpossible where the parent was taken in another way than this run shall be.
    """
    overlay_run.prepare(connection, domain, run, folder, ctx)


def choose(connection: Connection, domain: Domain, run: BackupRun, scratch: Path, ctx: Context) -> Mechanism:
    """How this run holds the VM, once all was looked at that can fail or wait. Touches nothing.

    What `backupcore_libvirt.look.look` raises; IncrementImpossible.
    """
    folder = RunFolder(scratch, run.id)
    found = look(connection, domain, without_bitmaps(run), scratch)
    if overlays := plan(domain, run, found.disks):
        return Overlays(domain, run, folder, ctx, replace(found, since=overlays.since), overlays)
    if found.live:
        return LiveJob(connection, domain, run, folder, ctx, found, job_socket(domain, folder))
    return OffNbd(connection, domain, run, folder, ctx, found)


def settle(
    connection: Connection, domain: Domain, run: BackupRun, outcome: Outcome, *, folder: RunFolder, ctx: Context
) -> list[BackupError]:
    """Bring the disks to rest after a run, in whichever way it held them, once its job is over; what hindered it.

    Finds out what is there: idempotent, also in a fresh process. What stays is the next run's to put right.
    """
    try:
        overlay_run.settle(connection, domain, run, outcome, folder=folder, ctx=ctx)
    except BackupError as error:
        return [error]
    return []


def forget(connection: Connection, domain: Domain, folder: RunFolder) -> Sequence[str]:
    """Remove all that increments would build on; the names of the checkpoints, bitmaps and overlays."""
    overlays = overlay_run.forget(connection, domain, folder)
    return [*checkpoint.forget(domain), *overlays]
