"""What a run with INCREMENT_MODE=SNAPSHOT takes of each disk, and whether it can. Looking changes nothing."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from backupcore.errors import IncrementImpossible, TargetFull
from backupcore.model import BackupRun, DiskEstimate
from backupcore_libvirt import qemu_img
from backupcore_libvirt.apparmor import MENDED, denies_merges
from backupcore_libvirt.checkpoint import Since, is_ours
from backupcore_libvirt.connection import Connection, Domain
from backupcore_libvirt.disks import SourceDisk
from backupcore_libvirt.overlay.stack import Stack, is_regular, overlay_path, stacks
from backupcore_libvirt.overlay.unwritten import has_lost_its_note, written
from backupcore_libvirt.place.open_files import exchanged
from backupcore_libvirt.qcow2_header import files_of
from backupcore_libvirt.scratch import reserve
from backupcore_libvirt.states import no_overlay
from backupcore_libvirt.versions import text

__all__ = ["Part", "Plan", "closed_below", "plan", "wanted", "without_bitmaps"]

log = logging.getLogger("backupcore")

_NOT_TOLD = "it was made anew, or copied without its extended attributes"


@dataclass(frozen=True, slots=True)
class Part:
    """How one disk is taken: what its newest `depth` overlays hold, or all of it (0); `why` in an increment."""

    disk: SourceDisk
    stack: Stack
    depth: int
    why: str

    def allocated(self) -> int:
        """Bytes in use on the host by the files that hold what is taken."""
        first = len(self.stack.overlays) - self.depth if self.depth else -1
        files = [self.stack.file(index) for index in range(first, len(self.stack.overlays))]
        return sum(qemu_img.info(path, shape).allocated for path, shape in files)


@dataclass(frozen=True, slots=True)
class Plan:
    """How every disk of a run is taken."""

    parts: tuple[Part, ...]

    @property
    def since(self) -> Since:
        """Why disks are taken whole within an increment; no bitmap tells of the others."""
        return Since("", (), {part.disk.id: part.why for part in self.parts if part.why})

    def estimate(self) -> tuple[DiskEstimate, ...]:
        """What would be taken of each disk, about: by the room that its files need."""
        return tuple(
            DiskEstimate(id=part.disk.id, bytes=part.allocated(), whole=not part.depth, reason=part.why)
            for part in self.parts
        )


def wanted(run: BackupRun) -> bool:
    """Whether overlays shall tell what changes after this run."""
    return run.tracked and run.settings.get("INCREMENT_MODE") == "SNAPSHOT"


def without_bitmaps(run: BackupRun) -> BackupRun:
    """The run as `look.look` shall see it: where overlays are wanted, as one in which bitmaps have no part."""
    return replace(run, tracked=False, parent=None) if wanted(run) else run


def plan(connection: Connection, domain: Domain, run: BackupRun, disks: Sequence[SourceDisk]) -> Plan | None:
    """How each of `disks` is taken, and that a new overlay can be put on each. Changes nothing.

    None where no overlays are wanted, or where a full has to do without them. IncrementImpossible where overlays cannot
    be used, or where none reaches back to the parent's point.
    """
    if not wanted(run):
        return None
    why = closed_below(connection, domain) or _hindrance(domain, disks)
    found = {} if why else stacks(domain)
    why = (
        why
        or _hindering_files(run, [found[disk.id] for disk in disks])
        or _exchanged(domain, [found[disk.id] for disk in disks])
    )
    if why:
        if run.parent is not None:
            raise IncrementImpossible(why)
        if run.reason != why:
            log.warning("VM %s: no increment can follow this full: %s", domain.name, why)
        return None
    parts = tuple(_part(run, disk, found[disk.id]) for disk in disks)
    if run.parent is not None and not any(part.depth for part in parts):
        reasons = dict.fromkeys(part.why for part in parts)
        raise IncrementImpossible(
            next(iter(reasons)) if len(reasons) == 1 else "; ".join(f"disk {p.disk.id}: {p.why}" for p in parts)
        )
    for disk in disks:
        overlay_path(found[disk.id].base, run.point, disk.id, installation=run.installation)
    _require_room(disks)
    return Plan(parts)


def closed_below(connection: Connection, domain: Domain) -> str:
    """Why overlays would pile up on this VM, one more with each backup, or ""."""
    if not denies_merges(connection, domain):
        return ""
    return (
        f"AppArmor confines the VM, and before libvirt {text(MENDED)} denies it to merge an overlay that it does not "
        "write to, so INCREMENT_MODE=SNAPSHOT works only while it is off (or choose INCREMENT_MODE=CBT)"
    )


def _hindrance(domain: Domain, disks: Sequence[SourceDisk]) -> str:  # noqa: PLR0911 - one return a rule
    """Why this VM can have no overlays, or ""."""
    if not domain.is_persistent():
        return "the VM is transient: nothing would tell its next start of an overlay"
    if why := no_overlay(domain):
        return why
    if domain.is_saved() or domain.was_saved():
        return "the VM's memory is saved, together with the names of its disks' files; overlays would be passed by"
    if names := domain.snapshots():
        return f"the VM has snapshots ({', '.join(names):.200}); reverting to one would pass the overlays by"
    if names := [name for name in domain.checkpoints() if not is_ours(name)]:
        return f"the VM has checkpoints of somebody else ({', '.join(names):.200}), which overlays would break"
    for disk in disks:
        if disk.kind != "file" or not is_regular(disk.path):
            return f"disk {disk.id} ({disk.path}) is no plain file, beside which an overlay could lie"
        if not disk.source.is_plain:
            return f"disk {disk.id} is not simply its file ({disk.path}), which is all that an overlay can lie on"
        if disk.encrypted:
            return f"disk {disk.id} is encrypted; an overlay would hold what is written in plain text"
    return ""


def _hindering_files(run: BackupRun, found: Sequence[Stack]) -> str:
    own = set(run.spent) | ({run.parent.point} if run.parent else set())
    others = set(run.keep or ()) - own
    for stack in found:
        if stack.foreign:
            return f"disk {stack.disk} has a snapshot of somebody else ({stack.foreign}) above an overlay of ours"
        if stack.unsafe:
            return f"disk {stack.disk}: {stack.unsafe}"
        if foreign := stack.of_others(run.installation):
            return (
                f"disk {stack.disk} has overlays of another installation ({stack.overlays[foreign[0]].path}), which "
                "collect since its backups; this one gets fulls (if that one is gone: vmkeep vm forget VM --foreign)"
            )
        if any(overlay.point in others for overlay in stack.overlays):
            # Overlays collect since one backup: what they hold cannot be told since another one as well.
            return (
                "with INCREMENT_MODE=SNAPSHOT a VM has one chain of increments, and this VM's is in another datastore; "
                "this one gets fulls (with INCREMENT_MODE=CBT every datastore has a chain of its own)"
            )
        for path, shape in {(stack.top, stack.top_shape), (stack.base, stack.shape)}:
            if names := qemu_img.info(path, shape).snapshots:
                return f"{path} has snapshots ({', '.join(names):.200}); reverting to one would pass the overlays by"
    return ""


def _exchanged(domain: Domain, found: Iterable[Stack]) -> str:
    if not domain.is_active():
        return ""
    return exchanged(domain, [file for stack in found for file in files_of(stack.top, stack.top_shape)])


def _part(run: BackupRun, disk: SourceDisk, stack: Stack) -> Part:
    if run.parent is None:
        return Part(disk, stack, 0, "")
    before = next((held for held in run.parent.disks if held.id == disk.id), None)
    if before is None:
        return Part(disk, stack, 0, "added since the last backup")
    index = stack.index(run.parent.point)
    if index is None:
        return Part(disk, stack, 0, _why_not_told(run.parent.point, run.installation, stack))
    size = qemu_img.info(stack.top, stack.top_shape).virtual_size
    if size < before.virtual_size:
        return Part(disk, stack, 0, f"it has shrunk from {before.virtual_size} to {size} bytes")
    overlay = stack.overlays[index].path
    why = written(overlay)
    if why is None and has_lost_its_note(overlay):
        why = f"{overlay} does not tell any more what it lay on at the last backup: {_NOT_TOLD}"
    if why:
        return Part(disk, stack, 0, why)
    return Part(disk, stack, len(stack.overlays) - index, "")


def _why_not_told(point: str, installation: str, stack: Stack) -> str:
    for whose in {installation, ""}:  # older versions named none
        lost = overlay_path(stack.base, point, stack.disk, installation=whose)
        if os.path.lexists(lost):
            return f"it lies on {stack.top}, no longer on {lost}, which holds what was written since the last backup"
    return "no overlay has collected changes since the last backup"


def _require_room(disks: Sequence[SourceDisk]) -> None:
    for disk in disks:
        usage = shutil.disk_usage(Path(disk.path).parent)
        needed = 2 * reserve(usage.total)
        if usage.free < needed:
            raise TargetFull(
                f"disk {disk.id}: {usage.free >> 20} MiB are free beside {disk.path}, {needed >> 20} MiB are needed: "
                "an overlay that cannot grow would stop the guest",
                "Make room there, or choose INCREMENT_MODE=CBT.",
            )
