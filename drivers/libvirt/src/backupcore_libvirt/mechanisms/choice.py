"""The one place that chooses how a VM is held, and that lets go of whatever holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from backupcore.context import Context
from backupcore.errors import BackupError, IncrementImpossible, TargetFull, UnsupportedOperation
from backupcore.model import BackupRun, Outcome
from backupcore.typed import typed
from backupcore_libvirt import checkpoint
from backupcore_libvirt.connection import Connection, Domain
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.iothreads import with_iothreads
from backupcore_libvirt.look import Look, look
from backupcore_libvirt.mechanisms.live_job import LiveJob
from backupcore_libvirt.mechanisms.mechanism import Mechanism
from backupcore_libvirt.mechanisms.off_nbd import OffNbd
from backupcore_libvirt.mechanisms.overlays import Overlays
from backupcore_libvirt.mechanisms.temporary_overlays import TemporaryOverlays
from backupcore_libvirt.overlay import left, temporary
from backupcore_libvirt.overlay import run as overlay_run
from backupcore_libvirt.overlay.plan import plan, wanted, without_bitmaps
from backupcore_libvirt.place.job_socket import job_socket
from backupcore_libvirt.scratch import require_room, scratch_room
from backupcore_libvirt.states import refused_with_overlays
from backupcore_libvirt.versions import qemu_of, survives_clients_of_iothreads, text

__all__ = ["choose", "finish", "forget", "prepare", "settle"]


def prepare(connection: Connection, domain: Domain, run: BackupRun, folder: RunFolder, ctx: Context) -> None:
    """Put the VM's disks into the state in which a way can be chosen: finish what earlier runs have left of theirs.

    IncrementImpossible where the parent was taken in another way than this run shall be.
    """
    try:
        left.merge_left(connection, domain, folder, ctx, run.installation)
    except BackupError as error:
        # Whatever way is chosen then reads through what stays, and takes that disk whole. `settle` tries it again at
        # the end of the run, and tells it then: a warning now would be told twice.
        ctx.check()
        ctx.log.info("VM %s: an overlay of a dead run stays for now: %s", domain.name, error.in_full)
    overlay_run.prepare(connection, domain, run, folder, ctx)


def choose(connection: Connection, domain: Domain, run: BackupRun, scratch: Path, ctx: Context) -> Mechanism:
    """How this run holds the VM, once all was looked at that can fail or wait. Touches nothing.

    What `backupcore_libvirt.look.look` raises; IncrementImpossible.
    """
    folder = RunFolder(scratch, run.id)
    found = look(connection, domain, without_bitmaps(run), scratch)
    overlays = None if _shared(domain, run, found, ctx) else plan(connection, domain, run, found.disks)
    if overlays:
        _refuse_stopped(domain, found)
        return Overlays(domain, run, folder, ctx, replace(found, since=overlays.since), overlays)
    if not found.live:
        return OffNbd(connection, domain, run, folder, ctx, found)
    if why := _killing(domain, found):
        _refuse_stopped(domain, found)
        held = _without_job(domain, run, found, scratch, why)
        return TemporaryOverlays(connection, domain, run, folder, ctx, found, held)
    _require_room(domain, found, scratch)
    return LiveJob(connection, domain, run, folder, ctx, found, job_socket(domain, folder))


def _shared(domain: Domain, run: BackupRun, found: Look, ctx: Context) -> bool:
    """Whether overlays shall tell what changes, and other installations' bitmaps do, which overlays would break.

    IncrementImpossible where that ends a chain.
    """
    others = checkpoint.of_others(domain, found.nodes, run.installation) if wanted(run) else []
    if not others:
        return False
    why = (
        f"the VM has checkpoints of another installation ({', '.join(others):.200}), which overlays would break (if "
        f"that one is gone: {typed('vmkeep vm forget', domain.name, '--foreign')})"
    )
    if run.parent is not None:
        raise IncrementImpossible(why)
    if run.reason != why:
        ctx.log.warning("VM %s: no increment can follow this full: %s", domain.name, why)
    return True


def _refuse_stopped(domain: Domain, found: Look) -> None:
    if found.stopped:
        raise refused_with_overlays(domain.name)


def _killing(domain: Domain, found: Look) -> str:
    """Why a backup job would kill this VM, or ""."""
    qemu = qemu_of(domain)
    if survives_clients_of_iothreads(qemu):
        return ""
    threads = with_iothreads(domain, [disk.id for disk in found.disks])
    if not threads:
        return ""
    disk, told = next(iter(threads.items()))
    return f"disk {disk} has an I/O thread ({told} says so), and QEMU {text(qemu)} would be killed by a backup job"


def _without_job(domain: Domain, run: BackupRun, found: Look, scratch: Path, why: str) -> tuple[temporary.Held, ...]:
    try:
        return temporary.plan(domain, run, found, scratch)
    except UnsupportedOperation as error:
        raise UnsupportedOperation(
            f"VM {domain.name}: {why}. It can be backed up with an overlay on each disk, but {error.message}",
            "Back it up while it is off, take the I/O thread away, or let it run in QEMU 8.2.3, 9.0 or newer.",
        ) from error


def _require_room(domain: Domain, found: Look, scratch: Path) -> None:
    """TargetFull unless there is room for what the guest overwrites during a backup job."""
    require_room(scratch)
    # With these policies QEMU does not stop a guest when scratch is full: its writes are lost.
    losing = [disk for disk in found.disks if disk.error_policy in ("report", "ignore")]
    needed = sum(found.nodes[disk.id].virtual_size for disk in losing)
    free, kept = scratch_room(scratch)
    if losing and free < needed + kept:
        names = ", ".join(f"{disk.id} (error_policy={disk.error_policy!r})" for disk in losing)
        raise TargetFull(
            f"VM {domain.name}: if scratch filled up, the guest would lose writes to {names}; so {needed + kept} bytes "
            f"are needed in {scratch}, {free} are free",
            "Make room there, or remove error_policy from these disks: QEMU then stops the guest instead.",
        )


def settle(
    connection: Connection, domain: Domain, run: BackupRun, outcome: Outcome, *, folder: RunFolder, ctx: Context
) -> list[BackupError]:
    """Bring the disks to rest after a run, in whichever way it held them, once its job is over; what hindered it.

    Finds out what is there: idempotent, also in a fresh process. What stays is the next run's to put right.
    """
    errors = []
    try:
        left.settle(connection, domain, outcome, run.installation, folder=folder, ctx=ctx)
    except BackupError as error:
        errors.append(error)
    try:
        overlay_run.settle(connection, domain, run, outcome, folder=folder, ctx=ctx)
    except BackupError as error:
        errors.append(error)
    return errors


def finish(connection: Connection, domain: Domain, folder: RunFolder, ctx: Context, installation: str) -> None:
    """Bring the disks to rest where a dead run has not done so, whatever is known of it. `folder` is there afterwards
    no more. BackupError where something stays.
    """
    try:
        left.merge_left(connection, domain, folder, ctx, installation)
    finally:
        folder.remove()


def forget(
    connection: Connection, domain: Domain, folder: RunFolder, installation: str, *, foreign: bool = False
) -> Sequence[str]:
    """Remove all that increments of this installation would build on: checkpoints, bitmaps, overlays; their names.

    With `foreign` what those of all other installations would.
    """
    overlays = overlay_run.forget(connection, domain, folder, installation, foreign=foreign)
    return [*checkpoint.forget(domain, installation, foreign=foreign), *overlays]
