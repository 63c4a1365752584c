"""Overlays that are there for one run: how a running VM is held without a reader that is connected to its QEMU.

A run puts an overlay on all disks at one instant. The files or devices below are written to by nobody then: `qemu-nbd`
of ours reads them, with the bitmap of the last backup. At the end of the run each overlay is merged back (`left`), and
the VM has its plain disks again. Nothing is held: a reader that hangs or dies, and a run that is killed, leave a guest
that goes on in its overlay until the next run, `recover` or whoever calls `left.merge_left` merges it.

What the bitmaps tell: QEMU stores all of them as it opens the files below for reading only, so the last backup's holds
every change up to the instant. This run's was made just before, in the same file: what was written in between is in
this backup and again in the next one. What the guest writes during the run comes into that file by the merge, whose
writes QEMU's bitmaps record as any others; so does `qemu-img commit` where the VM is off by then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from backupcore.context import Context
from backupcore.errors import Busy, HypervisorError, UnsupportedOperation
from backupcore.model import BackupRun
from backupcore_libvirt.connection import Domain
from backupcore_libvirt.disks import SourceDisk, nodes
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.look import Look
from backupcore_libvirt.overlay.files import snapshot_xml
from backupcore_libvirt.overlay.folder import OverlayFolder
from backupcore_libvirt.overlay.room import Growing, require_room
from backupcore_libvirt.overlay.stack import Stack, is_regular, overlay_path, stacks
from backupcore_libvirt.place.open_files import exchanged
from backupcore_libvirt.premade.image import make_overlay
from backupcore_libvirt.qcow2_header import files_of
from backupcore_libvirt.qemu_nbd import QemuNbd
from backupcore_libvirt.reading.export import Export, called
from backupcore_libvirt.scratch import Owner
from backupcore_libvirt.states import no_overlay
from backupcore_libvirt.xml import parse

if TYPE_CHECKING:  # the process of the guard loads this to merge
    from backupcore_libvirt.release.guard import Guard

__all__ = ["Held", "begin", "make", "plan", "serve"]

_KNOWN = {"seclabel", "privateData"}
"""Children of a disk's <source> that change nothing of what is in its file: <slices>, say, make it a part of that."""


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


def plan(domain: Domain, run: BackupRun, seen: Look, scratch: Path) -> tuple[Held, ...]:
    """What each disk of a running VM gets. Changes nothing.

    UnsupportedOperation with what forbids overlays on this VM; TargetFull, HypervisorError.
    """
    folder = OverlayFolder(scratch, domain.uuid)
    found = stacks(domain)
    if why := _hindrance(domain, seen.disks, found, folder):
        raise UnsupportedOperation(why)
    held = tuple(
        Held(
            disk,
            found[disk.id],
            overlay_path(
                found[disk.id].base,
                run.point,
                disk.id,
                installation=run.installation,
                temporary=True,
                folder=folder.path if found[disk.id].on_device else None,
            ),
            seen.nodes[disk.id].virtual_size,
        )
        for disk in seen.disks
    )
    losing = {one.disk.id: one.size for one in held if one.disk.error_policy in ("report", "ignore")}
    require_room(domain.name, [one.growing for one in held], losing)
    return held


def _hindrance(  # noqa: PLR0911 - one return a rule
    domain: Domain, disks: Sequence[SourceDisk], found: Mapping[str, Stack], folder: OverlayFolder
) -> str:
    """Why this VM can have no overlay during a backup, or ""."""
    if not domain.is_persistent():
        return "the VM is transient: were it to end meanwhile, nothing would tell its next start of the overlay"
    if why := no_overlay(domain):
        return why
    parts = _parts_of_sources(domain.live_xml())
    for disk in disks:
        if disk.kind == "volume":
            return f"which file disk {disk.id} is libvirt does not tell: is the storage pool of {disk.path} active?"
        if unknown := parts[disk.id] - _KNOWN:
            return f"disk {disk.id} is more than its file: its <source> has <{'>, <'.join(sorted(unknown))}>"
        if disk.id not in found or not (found[disk.id].on_device or is_regular(disk.path)):
            return f"disk {disk.id} ({disk.path}) is neither a plain file nor a block device"
        if disk.encrypted:
            return f"disk {disk.id} is encrypted; an overlay would hold what is written in plain text"
        stack = found[disk.id]
        if stack.foreign:
            return f"disk {disk.id} has a snapshot of somebody else ({stack.foreign}) above an overlay of ours"
        if stack.unsafe:
            return f"disk {disk.id}: {stack.unsafe}"
        if stack.on_device and folder.in_memory():
            return (
                f"disk {disk.id} ({disk.path}) is a block device, whose overlay would lie in {folder.path}: in memory, "
                "so what the guest writes meanwhile would be lost if the host were. Set 'scratch' in the configuration "
                "to a folder on a disk"
            )
    return exchanged(domain, [file for disk in disks for file in _files(found[disk.id])])


def _files(stack: Stack) -> list[str]:
    return files_of(stack.top, stack.top_shape)


def _parts_of_sources(xml: str) -> Mapping[str, set[str]]:
    """What the source of each disk consists of, by the names of its children."""
    found = {}
    for element in parse(xml).iterfind("./devices/disk"):
        target, source = element.find("target"), element.find("source")
        if target is not None:
            found[target.get("dev", "")] = {str(child.tag) for child in source} if source is not None else set()
    return found


def make(domain: Domain, held: Sequence[Held], scratch: Path, owner: Owner) -> None:
    """Make the overlays, which nothing uses yet; those of devices are `owner`'s, as whom QEMU runs.

    Busy if the VM is not running any more.
    """
    OverlayFolder(scratch, domain.uuid).note([one.overlay for one in held])
    for one in held:
        own = owner if one.stack.on_device else None
        make_overlay(Path(one.overlay), one.size, one.stack.top, one.stack.top_shape, own)
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
    domain.snapshot(snapshot_xml(every, {one.disk.id: one.overlay for one in held}))
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
    files = [file for one in held for file in _files(one.stack)]
    guard.keep_closed(list(dict.fromkeys(files)), [one.overlay for one in held])
    exports = {}
    for one in held:
        ctx.check()
        bitmap = bitmaps.get(one.disk.id)
        server = QemuNbd(
            folder.socket_of(one.disk.id), one.stack.top, one.stack.top_shape, bitmaps=[bitmap] if bitmap else []
        )
        ctx.stack.enter_context(server)
        exports[one.disk.id] = Export(replace(server.address, disk=called(domain.name, one.disk.id)), bitmap)
    return exports
