"""A run with INCREMENT_MODE=SNAPSHOT.

At rest every disk is its base and one overlay, which holds what was written since the last backup. A run puts a new
overlay on all disks at one instant, reads the files below it, which nobody writes to any more, and once it is recorded
merges all but the new overlay into the base. A run that fails merges its new overlay back. Where that does not succeed
nothing is lost: an increment reads every overlay down to the one of the parent's point.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from backupcore.context import Context
from backupcore.errors import BackupError, Busy, Cancelled, HypervisorError, IncrementImpossible
from backupcore.model import BackupRun, Outcome, RunState
from backupcore_libvirt import checkpoint, qemu_img
from backupcore_libvirt.connection import IO_ERROR, PAUSED, Connection, Domain
from backupcore_libvirt.disks import located, nodes, source_disks
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.overlay.files import snapshot_xml, working
from backupcore_libvirt.overlay.folder import OverlayFolder
from backupcore_libvirt.overlay.merge import Merger, set_source
from backupcore_libvirt.overlay.plan import Plan, closed_below, wanted
from backupcore_libvirt.overlay.room import Growing
from backupcore_libvirt.overlay.stack import Stack, any_overlay, is_temporary, overlay_path, overlays_beside, stacks
from backupcore_libvirt.overlay.unwritten import announce, is_unwritten, mark, note, written
from backupcore_libvirt.premade.image import is_untouched, make_overlay
from backupcore_libvirt.qcow2_header import files_of
from backupcore_libvirt.qemu_nbd import QemuNbd
from backupcore_libvirt.reading.export import Export, called

if TYPE_CHECKING:  # the process of the guard loads this to merge
    from backupcore_libvirt.release.guard import Guard

__all__ = ["begin", "clear", "forget", "growing", "make", "prepare", "serve", "settle", "undo"]

log = logging.getLogger("backupcore")

UNDO_LIMIT = 60.0
"""Seconds for a failed run to merge its overlay back into a disk; the next run does it otherwise."""


def prepare(connection: Connection, domain: Domain, run: BackupRun, folder: RunFolder, ctx: Context) -> None:
    """Make the disks ready for a run: mend what earlier ones have left, or leave overlays where none are wanted.

    IncrementImpossible where the parent was taken by overlays and this run shall not be.
    """
    if not any_overlay(domain):
        return
    _put_back(domain, ctx)
    found = stacks(domain).values()
    closed = closed_below(connection, domain) if wanted(run) else ""
    if any(len(stack.overlays) > len(stack.of_others(run.installation)) for stack in found):
        if (not wanted(run) or closed) and run.parent is not None:
            if any(stack.index(run.parent.point) is not None for stack in found):
                raise IncrementImpossible(closed or "INCREMENT_MODE=SNAPSHOT is no longer set")
            return
        with working(folder, domain):
            if wanted(run) and not closed:
                _mend(connection, domain, run, folder.path, ctx)
            else:
                _leave(connection, domain, run.installation, folder.path, ctx)
    found = stacks(domain).values()
    if any(len(overlays_beside(stack.base, stack.disk)) > len(stack.overlays) for stack in found):
        with working(folder, domain):
            for stack in found:
                Merger(connection, domain, folder.path, ctx.check, run.installation).sweep(stack)


def _put_back(domain: Domain, ctx: Context) -> None:
    """Have a VM that is off use its overlays again, where it was defined anew without them and has not run since.

    What cannot be proved is left alone: `left.settle` tells it.
    """
    if domain.is_active() or domain.is_saved() or domain.was_saved():
        return
    for stack in stacks(domain).values():
        if stack.overlays or stack.foreign or stack.unsafe:
            continue
        unused = [path for path in overlays_beside(stack.base, stack.disk) if not is_untouched(Path(path))]
        if len(unused) != 1 or is_temporary(unused[0]):
            continue
        (path,) = unused
        below = qemu_img.info(path, "qcow2").backing
        if below is None or (below.path, below.shape) != (stack.base, stack.shape):
            continue
        if is_unwritten(path, stack.base) and not qemu_img.is_open_elsewhere(path):
            set_source(domain, stack.disk, path, "qcow2")
            ctx.log.warning(
                "VM %s was defined anew with %s for disk %s, without the overlay that holds what it has written "
                "since; nothing was written to that file, so it was put right: %s",
                domain.name,
                stack.base,
                stack.disk,
                path,
            )


def forget(
    connection: Connection, domain: Domain, folder: RunFolder, installation: str, *, foreign: bool = False
) -> list[str]:
    """Merge this installation's overlays, whatever increments would build on them, or with `foreign` all others'; their
    files.
    """
    gone: list[str] = []
    if not any_overlay(domain):
        return gone
    with working(folder, domain):
        merger = Merger(connection, domain, folder.path, _never, None if foreign else installation)
        for stack in stacks(domain).values():
            others = stack.of_others(installation)
            if not foreign and not others:
                gone += [overlay.path for overlay in stack.overlays]
                merger.merge_all(stack)
                continue
            mine = [index for index in range(len(stack.overlays)) if index not in others]
            for index in reversed(others if foreign else mine):
                gone.append(stack.overlays[index].path)
                merger.merge(stacks(domain)[stack.disk], index, index)
    folder.remove()
    OverlayFolder(folder.scratch, domain.uuid).tidy()
    return gone


def _mend(connection: Connection, domain: Domain, run: BackupRun, folder: Path, ctx: Context) -> None:
    """Finish what earlier runs have left: jobs, overlays that a recorded run has spent, and those of failed runs.

    What cannot be done is logged, and no reason not to back up: the increment then reads one overlay more.
    """
    merger = Merger(connection, domain, folder, ctx.check, run.installation)
    for stack in stacks(domain).values():
        if domain.is_active():
            merger.finish(stack)
    _mend_definition(domain, ctx)
    own = {run.parent.point} | set(run.spent) if run.parent else set(run.spent)
    others = set(run.keep or ()) - own
    for stack in stacks(domain).values():
        if any(overlay.point in others for overlay in stack.overlays) or stack.of_others(run.installation):
            continue
        recorded = max((index for index, overlay in enumerate(stack.overlays) if overlay.point in own), default=-1)
        try:
            # The upper ones first: the numbers of the lower ones stay.
            if recorded >= 0 and len(stack.overlays) - recorded > 2:
                merger.merge(stack, recorded + 1, len(stack.overlays) - 2)
            if recorded > 0:
                merger.merge(stacks(domain)[stack.disk], 0, recorded - 1)
        except BackupError as error:
            ctx.check()
            ctx.log.warning("disk %s of VM %s: overlays stay for now: %s", stack.disk, domain.name, error)


def _mend_definition(domain: Domain, ctx: Context) -> None:
    """Have the next start of a running VM use the overlays that it runs on.

    Whoever defines a running VM anew, with its disks as they were before the first backup, would lose at its next start
    what it has written since.
    """
    if not domain.is_active() or not domain.is_persistent():
        return
    stored = {disk.id: located(domain, disk).path for disk in source_disks(domain.inactive_xml())}
    for stack in stacks(domain).values():
        below = [stack.base, *(overlay.path for overlay in stack.overlays[:-1])]
        if stack.overlays and stored.get(stack.disk) in below:
            set_source(domain, stack.disk, stack.top, stack.top_shape)
            ctx.log.warning(
                "VM %s was defined anew with %s for disk %s, without the overlay that it runs on; put right: %s",
                domain.name,
                stored[stack.disk],
                stack.disk,
                stack.top,
            )


def growing(run: BackupRun, plan: Plan, sizes: Mapping[str, int]) -> list[Growing]:
    """What the guest's writes take beside the disks during a run of a VM that runs, whose disks have these sizes."""
    new = _new(run, plan)
    return [Growing.of(part.disk.id, new[part.disk.id], part.stack.top, sizes[part.disk.id]) for part in plan.parts]


def make(run: BackupRun, plan: Plan, sizes: Mapping[str, int]) -> None:
    """Make the new overlays of disks of these sizes, before the guest is brought to rest.

    Also for a VM that is off: libvirt would make them as root, open to all, and of a path with a comma it doubles that,
    so that the definition names a file which is not there (seen with 9.0). What is not used in the end goes with
    `settle`, or with the next run.
    """
    for part in plan.parts:
        path = _new(run, plan)[part.disk.id]
        make_overlay(Path(path), sizes[part.disk.id], part.stack.top, part.stack.top_shape)


def begin(
    domain: Domain, run: BackupRun, plan: Plan, every: Sequence[str], sizes: Mapping[str, int], *, live: bool
) -> datetime:
    """The one call that fixes the instant: a new overlay on all disks, or on none. The instant in UTC.

    `every` are the IDs of all disks of the VM, those that are left out among them; `sizes` are those of the overlays
    that `make` has made. HypervisorError if a disk has another size by now.
    """
    if resized := _resized(domain, plan, sizes, live=live):
        raise HypervisorError(f"VM {domain.name}: disk {resized} has just been resized", "Run the backup again.")
    date = datetime.now(UTC)
    domain.snapshot(snapshot_xml(every, _new(run, plan)))
    return date


def _resized(domain: Domain, plan: Plan, sizes: Mapping[str, int], *, live: bool) -> str:
    """A disk whose size is not the one that its overlay was made with; "" if there is none.

    Neither libvirt nor QEMU holds them against each other: the guest would see the overlay's size.
    """
    if live:
        found = nodes(domain, [part.disk for part in plan.parts])
        now = {disk: node.virtual_size for disk, node in found.items()}
    else:
        tops = {part.disk.id: (part.stack.top, part.stack.top_shape) for part in plan.parts}
        now = {disk: qemu_img.info(*top).virtual_size for disk, top in tops.items()}
    return next((disk for disk, size in now.items() if size != sizes[disk]), "")


def clear(domain: Domain, installation: str, *, live: bool) -> None:
    """Remove what of this installation would hinder overlays, before the guest is brought to rest.

    Busy if the VM was `live` and is not any more, or the other way round.
    """
    # libvirt puts no overlay on the disks of a VM that is off while it knows checkpoints, and they are of no more use.
    if forgotten := checkpoint.forget(domain, installation):
        log.info("VM %s: removed the checkpoints of changed block tracking: %s", domain.name, ", ".join(forgotten))
    if domain.is_active() != live:
        raise Busy(f"VM {domain.name} was {'switched off' if live else 'started'} just now", "Run the backup again.")


def serve(
    domain: Domain, run: BackupRun, plan: Plan, guard: Guard, *, folder: RunFolder, ctx: Context
) -> Mapping[str, Export]:
    """Serve the files below the new overlays; exports by disk ID.

    The servers live until the end of `ctx`, or `end_stray`.
    """
    new = _new(run, plan)
    after = stacks(domain)
    for part in plan.parts:
        if after[part.disk.id].top != new[part.disk.id]:
            raise HypervisorError(
                f"VM {domain.name}: libvirt has put an overlay on disk {part.disk.id}, but the VM does not use it"
            )
        # What lies below is merged first, by us or by whoever does it for us.
        (announce if part.stack.overlays else note)(new[part.disk.id])
    # Of raw files qemu-nbd keeps nobody away, and whoever merged into one now would tear what is being read.
    files = [file for part in plan.parts for file in files_of(part.stack.top, part.stack.top_shape)]
    guard.keep_closed(list(dict.fromkeys(files)), list(new.values()))
    exports = {}
    for part in plan.parts:
        ctx.check()
        server = QemuNbd(folder.socket_of(part.disk.id), part.stack.top, part.stack.top_shape, depth=part.depth > 0)
        ctx.stack.enter_context(server)
        address = replace(server.address, disk=called(domain.name, part.disk.id))
        exports[part.disk.id] = Export(address, None, part.depth)
    return exports


def _new(run: BackupRun, plan: Plan) -> Mapping[str, str]:
    """Where the new overlay of each disk goes."""
    return {
        part.disk.id: overlay_path(part.stack.base, run.point, part.disk.id, installation=run.installation)
        for part in plan.parts
    }


def settle(
    connection: Connection, domain: Domain, run: BackupRun, outcome: Outcome, *, folder: RunFolder, ctx: Context
) -> None:
    """Bring the disks to rest after a run, whether the VM runs or not: the run's overlays tell what is to be done.

    Recorded: all below them goes into the base. Otherwise they go themselves, so the disks are as before. Idempotent,
    also in a fresh process. Nobody may read the files any more: QEMU's lock would refuse the merge. HypervisorError
    where an overlay stays, Cancelled: the next run goes on with it. One that stays since its disk was resized is logged
    and no error: only a further run's overlay above it makes the merge possible.
    """
    if outcome.state is not RunState.RECORDED:
        undo(connection, domain, run.point, run.installation, folder=folder, ctx=ctx, check=_within(UNDO_LIMIT))
        return
    check = _until_cancelled(domain, ctx)
    _settle(connection, domain, run.point, run.installation, folder=folder, ctx=ctx, check=check, recorded=True)


def undo(
    connection: Connection,
    domain: Domain,
    point: str,
    installation: str,
    *,
    folder: RunFolder,
    ctx: Context,
    check: Callable[[], None],
) -> None:
    """Bring the disks to rest after a run that came to nothing, of which only point and owner are known. As `settle`.

    `check` is called while it waits, and raises to give up.
    """
    _settle(connection, domain, point, installation, folder=folder, ctx=ctx, check=check, recorded=False)


def _settle(
    connection: Connection,
    domain: Domain,
    point: str,
    installation: str,
    *,
    folder: RunFolder,
    ctx: Context,
    check: Callable[[], None],
    recorded: bool,
) -> None:
    if f".backupcore-{point}-" not in domain.live_xml():
        _remove_unused(connection, domain, point, installation, folder)
        return
    found = stacks(domain)
    if all(stack.index(point) is None for stack in found.values()):
        return  # those of another kind
    newer = _newer(found.values(), point)
    errors: list[BackupError] = []
    with working(folder, domain):
        merger = Merger(connection, domain, folder.path, check, installation)
        for stack in found.values():
            try:
                if domain.is_active():
                    merger.finish(stack)
                now = stacks(domain)[stack.disk]
                low, high = _kept_below(now, point, newer) if recorded else _undone(now, point)
                if low > high:
                    continue
                # On a disk that the run did not take no later overlay will help: there it is an error.
                hindrance = merger.hindrance(now, low, high) if now.index(point) is not None else None
                if hindrance:
                    ctx.log.warning("an overlay stays for now: %s", hindrance)
                else:
                    merger.merge(now, low, high)
            except BackupError as error:  # the other disks all the same
                errors.append(error)
    if recorded:
        _mark(domain)
    if errors:
        raise errors[0]
    if domain.state() == (PAUSED, IO_ERROR):
        # QEMU stopped it when an overlay could not grow; by the merge there is room again.
        domain.resume()
        ctx.did("let the guest go on, which QEMU had stopped after an I/O error")


def _mark(domain: Domain) -> None:
    """Have each disk's lowest overlay tell what its base is now, for `_put_back` and the next increment."""
    for stack in stacks(domain).values():
        if stack.overlays and not stack.overlays[0].temporary:
            mark(stack.overlays[0].path, stack.base)
            if written(stack.overlays[0].path) is None:
                note(stack.overlays[0].path)


def _remove_unused(connection: Connection, domain: Domain, point: str, installation: str, folder: RunFolder) -> None:
    """Remove the overlays that were made for a run which then put none on any disk."""
    unused = [
        disk.id
        for disk in (located(domain, one) for one in source_disks(domain.live_xml()))
        if disk.kind == "file"
        and disk.path.startswith("/")
        and any(Path(disk.path).parent.glob(f"*.backupcore-{point}-{disk.id}.*qcow2"))
    ]
    if not unused:
        return
    with working(folder, domain):
        merger = Merger(connection, domain, folder.path, _never, installation)
        for disk, stack in stacks(domain).items():
            if disk in unused:
                merger.sweep(stack)


def _newer(found: Collection[Stack], point: str) -> set[str]:
    """The points of overlays that lie above that of `point` on some disk: of runs that came after it."""
    above: set[str] = set()
    for stack in found:
        index = stack.index(point)
        if index is not None:
            above.update(overlay.point for overlay in stack.overlays[index + 1 :])
    return above


def _kept_below(stack: Stack, point: str, newer: Collection[str]) -> tuple[int, int]:
    """The overlays (first, last) of a disk that go after the recorded run of `point`; (0, -1) for none.

    Without an overlay of that point: all up to the first of a later run, which the next increment reads. A disk that
    the run did not take has none of those: nothing builds on its overlays any more.
    """
    index = stack.index(point)
    if index is None:
        later = (place for place, overlay in enumerate(stack.overlays) if overlay.point in newer)
        index = next(later, len(stack.overlays))
    return 0, index - 1


def _undone(stack: Stack, point: str) -> tuple[int, int]:
    """The overlays (first, last) of a disk that go after the failed run of `point`; (0, -1) for none."""
    top = len(stack.overlays) - 1
    return (top, top) if stack.overlays and stack.index(point) == top else (0, -1)


def _leave(connection: Connection, domain: Domain, installation: str, folder: Path, ctx: Context) -> None:
    """Bring the VM back to its plain disks: every overlay of this installation goes into its base. Idempotent.

    What cannot be done is logged: a backup by changed block tracking works with overlays below it as well.
    """
    merger = Merger(connection, domain, folder, ctx.check, installation)
    for stack in stacks(domain).values():
        try:
            merger.merge_all(stack)
        except BackupError as error:
            ctx.check()
            ctx.log.warning("disk %s of VM %s keeps its overlay for now: %s", stack.disk, domain.name, error)


def _never() -> None:
    """Nothing but an error ends the wait."""


def _within(seconds: float) -> Callable[[], None]:
    deadline = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() > deadline:
            raise HypervisorError(f"an overlay was not merged within {seconds:.0f} s", "The next backup does it.")

    return check


def _until_cancelled(domain: Domain, ctx: Context) -> Callable[[], None]:
    def check() -> None:
        if ctx.cancelled:
            raise Cancelled(
                f"VM {domain.name}: the merge of its overlays was not waited for", "The next backup does it."
            )

    return check
