"""Checkpoints: the points from which changed blocks are tracked, by libvirt's record and by QEMU's bitmaps.

The bitmaps are the truth. libvirt's record is lost by an undefine, by the end of a transient VM, and was never made
for a VM that was off; it outlives bitmaps that a crash of QEMU has lost. So a disk's changes are told by the parent's
bitmap alone, on the image that the disk was at the parent; the record is made anew where libvirt asks for it. Each has
a mark beside it (`backupcore_libvirt.marks`), by which the disk is known again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, tostring

from backupcore.errors import BackupError, HypervisorError, IncrementImpossible
from backupcore.hypervisor import Checkpoint
from backupcore.model import BackupRun, Disk, Link, Outcome, RunState
from backupcore_libvirt.connection import CHECKPOINT_INCONSISTENT, NO_CHECKPOINT, Domain
from backupcore_libvirt.disks import Node, SourceDisk, located, nodes, source_disks
from backupcore_libvirt.libvirt_errors import code_of
from backupcore_libvirt.reading.cut import REASON as CUT
from backupcore_libvirt.stamps import Stamp, changed
from backupcore_libvirt.states import require_here
from backupcore_libvirt.stopped import remove_bitmap, stopped_nodes
from backupcore_libvirt.xml import parse

__all__ = [
    "Since",
    "checkpoint_name",
    "checkpoint_xml",
    "delete",
    "forget",
    "found",
    "is_ours",
    "make_known",
    "mark_name",
    "of_others",
    "recorded_paths",
    "since",
    "tidy",
]

_OURS = re.compile(
    r"backupcore-(?:(?P<installation>[0-9a-f]{32})-)?(?P<point>[0-9a-f]{32})(?:-(?P<marked>[A-Za-z0-9._-]+))?"
)


def checkpoint_name(point: str, installation: str = "") -> str:
    """The checkpoint of a point; bitmaps have its name too. Older versions wrote no installation into it."""
    return f"backupcore-{installation}-{point}" if installation else f"backupcore-{point}"


def mark_name(checkpoint: str, disk: str) -> str:
    """The mark beside the bitmap of a checkpoint, on the image of this disk."""
    return f"{checkpoint}-{disk}"


def _is_mark(name: str) -> bool:
    found = _OURS.fullmatch(name)
    return found is not None and found["marked"] is not None


def is_ours(name: str) -> bool:
    """Whether a checkpoint or bitmap of this name was made by backupcore, in whichever installation."""
    return _OURS.fullmatch(name) is not None


def _is_of(name: str, installation: str) -> bool:
    """Whether a checkpoint or bitmap of backupcore is this installation's; one that says none is anybody's."""
    found = _OURS.fullmatch(name)
    return found is not None and (found["installation"] or "") in ("", installation)


def _point(name: str) -> str:
    found = _OURS.fullmatch(name)
    return found["point"] if found else ""


def checkpoint_xml(name: str, vm_disks: Sequence[str], tracked: Collection[str]) -> str | None:
    """The ``<domaincheckpoint>`` of that name, with a bitmap on each disk of `tracked`; None if there is none to make.

    Every disk of the VM is listed: for one that is not, libvirt decides, and it would accept a checkpoint of no disk.
    """
    if not tracked:
        return None
    return tostring(_checkpoint(name, vm_disks, tracked), encoding="unicode")


def _checkpoint(name: str, vm_disks: Sequence[str], tracked: Collection[str]) -> Element:
    root = Element("domaincheckpoint")
    SubElement(root, "name").text = name
    listed = SubElement(root, "disks")
    for disk in vm_disks:
        kind = {"checkpoint": "bitmap", "bitmap": name} if disk in tracked else {"checkpoint": "no"}
        SubElement(listed, "disk", {"name": disk} | kind)
    return root


@dataclass(frozen=True, slots=True)
class Since:
    """How an increment can be taken.

    Of the disks `changed` bitmap `name` tells the changes since the parent; `whole` says why each other is taken whole.
    """

    name: str
    changed: tuple[str, ...]
    whole: Mapping[str, str]


def since(
    domain: Domain,
    parent: Link,
    disks: Sequence[SourceDisk],
    opened: Mapping[str, Node],
    below: Mapping[str, Sequence[Stamp]],
) -> Since:
    """What can tell the changes of `disks` since `parent`. IncrementImpossible with the reasons if nothing can.

    `below` are the files below each disk.
    """
    name = _name_of(domain, parent.point, opened)
    held = {disk.id: disk for disk in parent.disks}
    recorded: Mapping[str, str] | None = None
    whole: dict[str, str] = {}
    for disk in disks:
        before = held.get(disk.id)
        if before is None:
            whole[disk.id] = "added since the last backup"
            continue
        path = before.path
        if not path:
            recorded = recorded_paths(domain, name) if recorded is None else recorded
            path = recorded.get(disk.id, "")
        if reason := _why_whole(disk, opened[disk.id], name, path, before) or _why_not_known(
            disk, opened[disk.id], name, before, below
        ):
            whole[disk.id] = reason
    changed = tuple(disk.id for disk in disks if disk.id not in whole)
    if not changed:
        raise IncrementImpossible("; ".join(f"disk {disk}: {reason}" for disk, reason in whole.items()))
    return Since(name, changed, whole)


def _name_of(domain: Domain, point: str, opened: Mapping[str, Node]) -> str:
    """The name that the checkpoint of a point has: an older version, or another installation, may have made it.

    Nobody but its chain knows a point, so whoever's name stands beside it is of no importance.
    """
    every = {bitmap.name for node in opened.values() for bitmap in node.bitmaps if _point(bitmap.name) == point}
    bitmaps = {name for name in every if not _is_mark(name)}
    names = bitmaps or {name for name in domain.checkpoints() if _point(name) == point}
    return min(names, default=checkpoint_name(point))


def _why_whole(  # noqa: PLR0911 - one return a rule
    disk: SourceDisk, node: Node, name: str, path: str, before: Disk
) -> str:
    if disk.format == "raw":
        return "raw: changed blocks are tracked in qcow2 only"
    if path and path != disk.path:
        # Another image under the same target, two disks swapped, or an overlay: its bitmap counts other changes.
        return f"it is now {disk.path}, at the last backup it was {path}"
    if node.virtual_size < before.virtual_size:
        # Its bitmap looks healthy, but what lay behind the cut is stale.
        return f"it has shrunk from {before.virtual_size} to {node.virtual_size} bytes"
    bitmap = next((bitmap for bitmap in node.bitmaps if bitmap.name == name), None)
    if bitmap is None:
        return "the bitmap of the last backup is missing: QEMU has crashed, it was removed, or this is another image"
    if bitmap.inconsistent:
        return "the bitmap of the last backup is inconsistent; QEMU has probably crashed since"
    if not bitmap.recording:
        return "the bitmap of the last backup is not recording"
    if not path:
        return "which image it was at the last backup is not known any more"
    return ""


def _why_not_known(disk: SourceDisk, node: Node, name: str, before: Disk, below: Mapping[str, Sequence[Stamp]]) -> str:
    """Why it may not be the disk that it was, or "": the bitmap of the last backup is there, and looks healthy."""
    marks = {bitmap.name: bitmap for bitmap in node.bitmaps if _is_mark(bitmap.name) and _is_beside(bitmap.name, name)}
    own = marks.get(mark_name(name, disk.id))
    if own is None and (marks or before.marked):
        # All disks have a bitmap of that name: another one's file may have come to this path.
        return f"{disk.path} bears no mark of the last backup of this disk: it is the image of another disk"
    if own is not None and own.dirty == 0:
        return CUT
    return changed(before.below, below[disk.id]) if before.below is not None else ""


def _is_beside(mark: str, checkpoint: str) -> bool:
    return mark.startswith(f"{checkpoint}-")


def recorded_paths(domain: Domain, name: str) -> dict[str, str]:
    """Where each disk lay when libvirt made this checkpoint; empty where libvirt does not know it, or not that."""
    try:
        then = parse(domain.checkpoint_xml(name)).find("domain")
    except BackupError as error:
        if code_of(error) != NO_CHECKPOINT:
            raise
        return {}
    if then is None:
        return {}
    before = source_disks(tostring(then, encoding="unicode"))
    return {disk.id: located(domain, disk).path for disk in before}


def make_known(domain: Domain, parent: Since, vm_disks: Sequence[str]) -> None:
    """Have libvirt know the checkpoint that a running VM's increment builds on: it may have forgotten it.

    libvirt looks at the bitmaps itself (REDEFINE_VALIDATE); IncrementImpossible where it finds one unfit.
    """
    if parent.name in domain.checkpoints():
        return
    root = _checkpoint(parent.name, vm_disks, parent.changed)
    SubElement(root, "creationTime").text = str(int(time.time()))  # demanded, and only shown
    try:
        domain.redefine_checkpoint(tostring(root, encoding="unicode"))
    except BackupError as error:
        if code_of(error) == CHECKPOINT_INCONSISTENT:
            raise IncrementImpossible(error.message) from error
        raise


def tidy(domain: Domain, run: BackupRun, outcome: Outcome) -> None:
    """Delete the checkpoints and bitmaps that this run's end makes superfluous, whether the VM runs or not.

    Once it is recorded those are `run.spent`, otherwise its own; and, where `run.keep` is given, every other one that
    this installation made: a dead run's, or a deleted image's. Nobody else's is touched, nor another installation's.
    Idempotent. HypervisorError where one stays.
    """
    kept = {run.parent.point} if run.parent else set()
    gone = {run.point}
    if outcome.state is RunState.RECORDED:
        kept.add(run.point)
        gone = set(run.spent) - kept
    kept |= set(run.keep or ()) - gone
    strays = run.keep is not None

    def superfluous(name: str) -> bool:
        return _point(name) in gone or (strays and _point(name) not in kept and _is_of(name, run.installation))

    _remove(domain, superfluous, run.installation)


def found(domain: Domain) -> list[Checkpoint]:
    """Every checkpoint and bitmap that backupcore made on this VM, in whichever installation, running or not."""
    names = {name for name in domain.checkpoints() if is_ours(name)}
    for node in _trackable(domain).values():
        names.update(_ours(node, lambda _: True))
    return [
        Checkpoint(name=name, point=match["point"], installation=match["installation"] or "")
        for name in sorted(names)
        if not _is_mark(name) and (match := _OURS.fullmatch(name))
    ]


def of_others(domain: Domain, opened: Mapping[str, Node], installation: str) -> list[str]:
    """The names of the checkpoints, and of the bitmaps on these disks, that other installations have made."""
    names = {*domain.checkpoints(), *(bitmap.name for node in opened.values() for bitmap in node.bitmaps)}
    return sorted(name for name in names if is_ours(name) and not _is_mark(name) and not _is_of(name, installation))


def delete(domain: Domain, points: Collection[str]) -> list[str]:
    """Delete the checkpoints of these points with their bitmaps, whether the VM runs or not; the names of those found.

    HypervisorError where one stays.
    """
    return _remove(domain, lambda name: _point(name) in points, "")


def forget(domain: Domain, installation: str = "", *, foreign: bool = False) -> list[str]:
    """Delete every checkpoint and bitmap that this installation made on this VM, running or not; their names.

    Those that say no installation go with them. With `foreign` all others go instead.
    """
    return _remove(domain, lambda name: _is_of(name, installation) is not foreign, installation)


def _remove(domain: Domain, chosen: Callable[[str], bool], installation: str) -> list[str]:
    """Delete those of our checkpoints and bitmaps that are `chosen`; their names.

    Their marks go with them, and those of this installation that somebody has left without their bitmap.

    Children stay: other chains' checkpoints may hang below these in libvirt's tree.
    """
    records = {name for name in domain.checkpoints() if _OURS.fullmatch(name) and chosen(name)}
    if domain.is_active():
        try:
            gone = _remove_running(domain, records, chosen, installation)
        except HypervisorError:
            if domain.is_active():
                raise
            gone = _remove_stopped(domain, chosen, installation)
    else:
        gone = _remove_stopped(domain, chosen, installation)
    for name in records.intersection(domain.checkpoints()):
        domain.delete_checkpoint(name, metadata_only=True)
    return sorted(name for name in gone | records if not _is_mark(name))


def _remove_running(
    domain: Domain, records: Collection[str], chosen: Callable[[str], bool], installation: str
) -> set[str]:
    for name in records:
        # It refuses one that has lost a bitmap on some disk; the others go below.
        with suppress(HypervisorError):
            domain.delete_checkpoint(name)
    gone = set()
    for node in nodes(domain, _trackable_disks(domain)).values():
        for name in (*_ours(node, chosen), *_bereft(node, chosen, installation)):
            domain.query("block-dirty-bitmap-remove", node=node.name, name=name)
            gone.add(name)
    return gone


def _remove_stopped(domain: Domain, chosen: Callable[[str], bool], installation: str) -> set[str]:
    # libvirt deletes bitmaps of running VMs only; for others it can just forget them, and they would stay in the image.
    require_here(domain)
    gone = set()
    disks = _trackable_disks(domain)
    found = stopped_nodes(domain.name, disks)
    for disk in disks:
        for name in (*_ours(found[disk.id], chosen), *_bereft(found[disk.id], chosen, installation)):
            remove_bitmap(disk, name)
            gone.add(name)
    return gone


def _trackable_disks(domain: Domain) -> list[SourceDisk]:
    """The disks that may have bitmaps; while the VM is off, those whose image is there and can be opened without a key:

    the bitmaps of an encrypted disk go when the VM runs.
    """
    running = domain.is_active()
    every = (located(domain, disk) for disk in source_disks(domain.live_xml()))
    disks = (disk for disk in every if disk.format == "qcow2" and not disk.left_out)
    return [disk for disk in disks if running or (Path(disk.path).exists() and not disk.encrypted)]


def _trackable(domain: Domain) -> Mapping[str, Node]:
    disks = _trackable_disks(domain)
    return nodes(domain, disks) if domain.is_active() else stopped_nodes(domain.name, disks)


def _ours(node: Node, chosen: Callable[[str], bool]) -> list[str]:
    return [bitmap.name for bitmap in node.bitmaps if _OURS.fullmatch(bitmap.name) and chosen(bitmap.name)]


def _bereft(node: Node, chosen: Callable[[str], bool], installation: str) -> list[str]:
    """The marks that are not `chosen` and have lost their bitmap (`virsh checkpoint-delete`): they prove nothing."""
    names = {bitmap.name for bitmap in node.bitmaps}
    return [
        name
        for name in _ours(node, lambda name: not chosen(name) and _is_mark(name) and _is_of(name, installation))
        if not any(_is_beside(name, other) for other in names)
    ]
