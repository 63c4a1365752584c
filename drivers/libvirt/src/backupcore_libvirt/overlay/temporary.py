"""Overlays that are there for one run: how a running VM is held without a reader that is connected to its QEMU.

A run puts an overlay on all disks at one instant. The files below are written to by nobody then: `qemu-nbd` of ours
reads them, with the bitmap of the last backup. At the end of the run each overlay is merged back, and the VM has its
plain disks again. Nothing is held: a reader that hangs or dies, and a run that is killed, leave a guest that goes on
in its overlay until the next run, `recover` or whoever calls `merge_left` merges it.

What the bitmaps tell: QEMU stores all of them as it opens the files below for reading only, so the last backup's holds
every change up to the instant. This run's was made just before, in the same file: what was written in between is in
this backup and again in the next one. What the guest writes during the run comes into that file by the merge, whose
writes QEMU's bitmaps record as any others; so does `qemu-img commit` where the VM is off by then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from backupcore.context import Context
from backupcore.errors import BackupError, Busy, Cancelled, HypervisorError, UnsupportedOperation
from backupcore.model import BackupRun, Outcome, RunState
from backupcore_libvirt import qemu_img
from backupcore_libvirt.checkpoint import is_ours, recorded_paths
from backupcore_libvirt.connection import IO_ERROR, PAUSED, Connection, Domain
from backupcore_libvirt.disks import SourceDisk, nodes, source_disks
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.look import Look
from backupcore_libvirt.overlay.files import snapshot_xml, working
from backupcore_libvirt.overlay.merge import Merger, named
from backupcore_libvirt.overlay.room import Growing, require_room
from backupcore_libvirt.overlay.stack import (
    Stack,
    base_of,
    is_overlay,
    is_regular,
    is_temporary,
    overlay_path,
    overlays_beside,
    stacks,
)
from backupcore_libvirt.premade.image import is_untouched, make_overlay
from backupcore_libvirt.qemu_nbd import QemuNbd, is_served
from backupcore_libvirt.reading.export import Export
from backupcore_libvirt.xml import parse

if TYPE_CHECKING:  # the process of the guard loads this to merge
    from backupcore_libvirt.release.guard import Guard

__all__ = ["Held", "begin", "left", "make", "merge_left", "plan", "remarks", "serve", "settle", "unused"]

log = logging.getLogger("backupcore")

_KNOWN = {"seclabel", "privateData"}
"""Children of a disk's <source> that change nothing of what is in its file: <slices>, say, make it a part of that."""
MERGE_LIMIT = 600.0
"""Seconds that the end of a failed run waits for the merge of a disk; the guest goes on meanwhile, whatever comes."""


@dataclass(frozen=True, slots=True)
class Held:
    """One disk of a run: its files before, the overlay that it gets, and its size in bytes."""

    disk: SourceDisk
    stack: Stack
    overlay: str
    size: int

    @property
    def growing(self) -> Growing:
        """What the guest's writes take of the file system meanwhile."""
        return Growing.of(self.disk.id, self.overlay, self.stack.top, self.size)


def plan(domain: Domain, run: BackupRun, seen: Look) -> tuple[Held, ...]:
    """What each disk of a running VM gets. Changes nothing.

    UnsupportedOperation with what forbids overlays on this VM; TargetFull, HypervisorError.
    """
    found = stacks(domain)
    if why := _hindrance(domain, seen.disks, found):
        raise UnsupportedOperation(why)
    held = tuple(
        Held(
            disk,
            found[disk.id],
            overlay_path(found[disk.id].base, run.point, disk.id, temporary=True),
            seen.nodes[disk.id].virtual_size,
        )
        for disk in seen.disks
    )
    losing = {one.disk.id: one.size for one in held if one.disk.error_policy in ("report", "ignore")}
    require_room(domain.name, [one.growing for one in held], losing)
    return held


def _hindrance(domain: Domain, disks: Sequence[SourceDisk], found: Mapping[str, Stack]) -> str:  # noqa: PLR0911 - one return a rule
    """Why this VM can have no overlay during a backup, or ""."""
    if not domain.is_persistent():
        return "the VM is transient: were it to end meanwhile, nothing would tell its next start of the overlay"
    parts = _parts_of_sources(domain.live_xml())
    for disk in disks:
        if disk.kind != "file" or disk.id not in found or not is_regular(disk.path):
            return f"disk {disk.id} ({disk.path}) is no plain file, beside which an overlay could lie"
        if disk.encrypted:
            return f"disk {disk.id} is encrypted; an overlay would hold what is written in plain text"
        if unknown := parts[disk.id] - _KNOWN:
            return f"disk {disk.id} is more than its file: its <source> has <{'>, <'.join(sorted(unknown))}>"
        stack = found[disk.id]
        if stack.foreign:
            return f"disk {disk.id} has a snapshot of somebody else ({stack.foreign}) above an overlay of ours"
        if stack.unsafe:
            return f"disk {disk.id}: {stack.unsafe}"
    return ""


def _parts_of_sources(xml: str) -> Mapping[str, set[str]]:
    """What the source of each disk consists of, by the names of its children."""
    found = {}
    for element in parse(xml).iterfind("./devices/disk"):
        target, source = element.find("target"), element.find("source")
        if target is not None:
            found[target.get("dev", "")] = {str(child.tag) for child in source} if source is not None else set()
    return found


def make(domain: Domain, held: Sequence[Held]) -> None:
    """Make the overlays, which nothing uses yet. Busy if the VM is not running any more."""
    for one in held:
        make_overlay(Path(one.overlay), one.size, one.stack.top, one.stack.top_shape)
    if not domain.is_active():
        raise Busy(f"VM {domain.name} was switched off just now", "Run the backup again.")


def begin(domain: Domain, held: Sequence[Held], every: Sequence[str]) -> datetime:
    """The one call that fixes the instant: the overlays come onto all disks, or onto none. The instant in UTC.

    `every` are the IDs of all disks of the VM, those that are left out among them. Busy if a disk was resized.
    """
    now = nodes(domain, [one.disk for one in held])
    for one in held:
        # QEMU would take an overlay of another size, and the guest's disk would have that.
        if now[one.disk.id].virtual_size != one.size:
            raise Busy(f"VM {domain.name}: disk {one.disk.id} was resized just now", "Run the backup again.")
    date = datetime.now(UTC)
    domain.snapshot(snapshot_xml(every, {one.disk.id: one.overlay for one in held}), reuse=True)
    return date


def serve(
    domain: Domain,
    held: Sequence[Held],
    bitmaps: Mapping[str, str],
    guard: Guard,
    *,
    folder: RunFolder,
    ctx: Context,
) -> Mapping[str, Export]:
    """Serve the files below the overlays; exports by disk ID.

    The servers live until the end of `ctx`, or `end_stray`.
    """
    after = stacks(domain)
    for one in held:
        if after[one.disk.id].top != one.overlay:
            raise HypervisorError(
                f"VM {domain.name}: libvirt has put an overlay on disk {one.disk.id}, but the VM does not use it"
            )
    # Whoever merged an overlay now, by hand or with another configuration, would tear what is being read; of raw files
    # qemu-nbd itself keeps nobody away.
    guard.keep_closed([Path(one.stack.top) for one in held])
    exports = {}
    for one in held:
        ctx.check()
        bitmap = bitmaps.get(one.disk.id)
        server = QemuNbd(
            folder.socket_of(one.disk.id), one.stack.top, one.stack.top_shape, bitmaps=[bitmap] if bitmap else []
        )
        ctx.stack.enter_context(server)
        exports[one.disk.id] = Export(server.address, bitmap)
    return exports


def settle(
    connection: Connection,
    domain: Domain,
    outcome: Outcome,
    made: Collection[str],
    *,
    folder: RunFolder,
    ctx: Context,
) -> None:
    """Merge the overlays of a run, whether it was recorded or not and whether the VM runs or not, and remove them.

    Those of dead runs too, where the run could not merge them at its begin. Idempotent, also in a fresh process. Nobody
    may read the files any more. HypervisorError, Busy where an overlay stays, Cancelled: the next run goes on with it;
    HypervisorError also where one holds something and nothing uses it. `made` are the run's own overlays, where known:
    a disk may have been detached since.
    """
    recorded = outcome.state is RunState.RECORDED
    check = _until_cancelled(domain, ctx) if recorded else _within(MERGE_LIMIT)
    _merge(connection, domain, folder, ctx, check=check)
    for path in _of_detached(domain, made):
        raise HypervisorError(
            f"VM {domain.name}: a disk was detached during a backup, or moved; what was written meanwhile lies in "
            f"{path}",
            f"Before the disk's old file is used again: qemu-img commit -f qcow2 {path}; then remove {path}.",
        )
    for path in unused(domain):
        raise HypervisorError(
            f"{path} holds what VM {domain.name} has written, and the VM does not use it: was it defined anew, or were "
            "its disks exchanged, during a backup?",
            "No backup holds that, and nothing removes the file. If the VM has not run since, make its disk use it "
            f"again (virsh edit); otherwise keep what it shows, 'qemu-img convert -f qcow2 -O qcow2 {path} COPY' while "
            "the VM is off, and remove it.",
        )


def merge_left(connection: Connection, domain: Domain, folder: RunFolder, ctx: Context) -> None:
    """Merge the overlays of whatever run that has ended without doing so, and say so to `ctx`. As `settle`."""
    _merge(connection, domain, folder, ctx, check=ctx.check, told=True)


def left(domain: Domain) -> list[str]:
    """The overlays of single runs that lie beside this VM's disks, used or not; by their names, so it is quick."""
    beside = [
        path
        for disk in source_disks(domain.live_xml())
        if disk.kind == "file"
        # Its own file too: a disk on another bus has another ID than its overlay tells.
        for path in (disk.path, *overlays_beside(base_of(disk.path), disk.id))
        if is_temporary(path)
    ]
    return list(dict.fromkeys([*beside, *_covered(domain)]))


def _covered(domain: Domain) -> list[str]:
    """The overlays of single runs on which somebody has put a snapshot of theirs, as far as the definition tells.

    It lists what lies below a disk's file only while the VM runs.
    """
    found = []
    for disk in parse(domain.live_xml()).iterfind("./devices/disk"):
        top, *below = [source.get("file", "") for source in disk.iter("source")] or [""]
        if not is_overlay(top):
            found += [path for path in below if is_temporary(path)]
    return found


def _of_detached(domain: Domain, made: Collection[str]) -> list[str]:
    """The overlays of single runs that hold something, of disks that the VM had at a backup and has not any more."""
    here = {disk.id for disk in source_disks(domain.live_xml())}
    gone = {
        (base_of(path), disk)
        for name in domain.checkpoints()
        if is_ours(name)
        for disk, path in recorded_paths(domain, name).items()
        if disk not in here
    }
    found = {path for base, disk in gone for path in overlays_beside(base, disk)} | set(made)
    here_still = set(left(domain))
    return [path for path in sorted(found - here_still) if is_temporary(path) and is_regular(path) and _holds(path)]


def unused(domain: Domain) -> list[str]:
    """Those of `left` that hold something, and that neither this VM uses nor any process has open."""
    if not (names := left(domain)):
        return []
    if domain.is_active():
        # By the definition: a listing must not ask QEMU for its block nodes, see `vm_state`.
        used = named(domain.live_xml(), whole=True)
    else:
        used = {overlay.path for stack in stacks(domain).values() for overlay in stack.overlays}
    return [path for path in names if path not in used and _holds(path)]


def _holds(path: str) -> bool:
    """Whether an overlay holds something, and no process has it open."""
    # One whose making was cut off is no image for QEMU's programs.
    return not is_untouched(Path(path)) and not qemu_img.is_open_elsewhere(path) and not qemu_img.is_empty(path)


def remarks(domain: Domain) -> list[str]:
    """What to tell of a VM that no run backs up now: a line for each overlay that a run has left."""
    names = left(domain)
    if not names:
        return []
    lost, covered, used = unused(domain), _covered(domain), named(domain.live_xml(), whole=True)
    return [
        f"{path} holds what the VM has written, and the VM does not use it"
        if path in lost
        else f"somebody's snapshot lies on {path}, which a backup has left, so it is not merged"
        if path in covered
        else f"it writes to {path}, which a backup has left; 'vmkeep recover {domain.name}' merges it"
        for path in names
        if path in lost
        or path in used
        or (not is_untouched(Path(path)) and (not qemu_img.is_empty(path) or qemu_img.is_open_elsewhere(path)))
    ]


def _merge(
    connection: Connection,
    domain: Domain,
    folder: RunFolder,
    ctx: Context,
    *,
    check: Callable[[], None],
    told: bool = False,
) -> None:
    if not left(domain):
        return
    errors: list[BackupError] = []
    with working(folder, domain):
        merger = Merger(connection, domain, folder.path, check)
        for stack in stacks(domain).values():
            try:
                if _merge_one(merger, stack) and told:
                    ctx.did(f"merged the overlay of disk {stack.disk} that a dead run had left")
                merger.sweep(stacks(domain)[stack.disk])
            except BackupError as error:  # the other disks all the same
                errors.append(error)
    errors += [
        HypervisorError(
            f"VM {domain.name}: {path} is not merged: somebody's snapshot lies on it",
            f"The VM goes on as it is. Remove that snapshot (virsh snapshot-list {domain.name} may show it), then run "
            f"'vmkeep recover {domain.name}'.",
        )
        for path in _covered(domain)
    ]
    if errors:
        raise errors[0]
    if domain.state() == (PAUSED, IO_ERROR):
        # QEMU stopped it when an overlay could not grow; on its own files the write that was stopped is done again.
        domain.resume()
        ctx.did("let the guest go on, which QEMU had stopped after an I/O error")


def _merge_one(merger: Merger, stack: Stack) -> bool:
    """Merge what is temporary in this stack; whether there was something."""
    domain = merger.domain
    if not stack.temporary():
        return False
    if domain.is_active():
        merger.finish(stack)
        stack = stacks(domain)[stack.disk]
    while places := stack.temporary():
        # The upper ones first, one by one: where AppArmor keeps the lowest from being merged they do not pile up.
        high = places[-1]
        below, _ = stack.file(high - 1)
        if is_served(below):
            raise Busy(
                f"VM {domain.name}: {below} is still read by a backup, so the overlay on it is not merged",
                "Wait until that backup has ended; the next one merges it.",
            )
        log.info("VM %s: merging the overlay of disk %s back into %s", domain.name, stack.disk, below)
        live = domain.is_active()
        try:
            merger.merge(stack, high, high)
        except HypervisorError:
            if not live or domain.is_active():
                raise
            # It was switched off in the middle: all that it has written is in the overlay, which is merged now.
        stack = stacks(domain)[stack.disk]
    return True


def _within(seconds: float) -> Callable[[], None]:
    deadline = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() > deadline:
            raise HypervisorError(
                f"an overlay was not merged within {seconds:.0f} s: the guest writes as fast as it is merged",
                "It goes on in its overlay; the next backup or 'vmkeep recover' merges it.",
            )

    return check


def _until_cancelled(domain: Domain, ctx: Context) -> Callable[[], None]:
    def check() -> None:
        if ctx.cancelled:
            raise Cancelled(
                f"VM {domain.name}: the merge of its overlays was not waited for",
                "The guest goes on in them; the next backup or 'vmkeep recover' merges them.",
            )

    return check
