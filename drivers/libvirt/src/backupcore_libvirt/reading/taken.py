"""What is taken of each disk: its artifact in a run, and the estimate of one."""

from __future__ import annotations

from dataclasses import replace

from backupcore.disk.qcow2 import DiskArtifact
from backupcore.model import BackupRun, Disk, DiskEstimate
from backupcore_libvirt.connection import Domain
from backupcore_libvirt.disks import SourceDisk
from backupcore_libvirt.look import Look
from backupcore_libvirt.reading.cut import REASON as CUT
from backupcore_libvirt.reading.cut import tail, was_cut
from backupcore_libvirt.reading.export import Export, artifact

__all__ = ["estimate_of", "taken_of"]


def taken_of(disk: SourceDisk, export: Export, seen: Look, run: BackupRun) -> tuple[DiskArtifact, Disk]:
    """The artifact of one disk: what changed, or all of it."""
    reason = seen.since.whole.get(disk.id, "") if seen.since else ""
    then = next((one for one in run.parent.disks if one.id == disk.id), None) if run.parent else None
    found = artifact(disk.id, export, then.virtual_size if then else None)
    held = then.tail if then else ()
    if export.bitmap is not None and was_cut(export.address, found.layout, held):
        export, reason = replace(export, bitmap=None), CUT
        found = artifact(disk.id, export)
    whole = export.whole
    return found, Disk(
        id=disk.id,
        artifact=found.name,
        virtual_size=found.layout.virtual_size,
        whole=whole,
        reason=reason,
        path=disk.path,
        tail=tail(found.layout, () if whole else held),
    )


def estimate_of(domain: Domain, disk: SourceDisk, seen: Look) -> DiskEstimate:
    """How much a run would take of one disk, about; None where nothing tells."""
    name = seen.bitmaps.get(disk.id)
    if name is None:
        # libvirt cannot tell how much of a block device is in use.
        size = domain.block_sizes(disk.id)[1] if disk.kind != "block" else None
    else:
        size = next(bitmap.dirty for bitmap in seen.nodes[disk.id].bitmaps if bitmap.name == name)
    reason = seen.since.whole.get(disk.id, "") if seen.since else ""
    return DiskEstimate(id=disk.id, bytes=size, whole=name is None, reason=reason)
