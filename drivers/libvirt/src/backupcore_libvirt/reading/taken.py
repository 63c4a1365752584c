"""What is taken of each disk: its artifact in a run, and the estimate of one."""

from __future__ import annotations

from dataclasses import replace

from backupcore.disk.qcow2 import DiskArtifact
from backupcore.disk.reader import Reader
from backupcore.model import BackupRun, Disk, DiskEstimate
from backupcore_libvirt.connection import Domain
from backupcore_libvirt.disks import SourceDisk
from backupcore_libvirt.image_size import strange_kind
from backupcore_libvirt.look import Look
from backupcore_libvirt.reading.cut import REASON as CUT
from backupcore_libvirt.reading.cut import tail, was_cut
from backupcore_libvirt.reading.export import Export, layout_of

__all__ = ["estimate_of", "taken_of"]


def taken_of(disk: SourceDisk, export: Export, seen: Look, run: BackupRun, reader: Reader) -> tuple[DiskArtifact, Disk]:
    """The artifact of one disk: what changed, or all of it. Only the reader's process connects to the export."""
    reason = seen.since.whole.get(disk.id, "") if seen.since else ""
    then = next((one for one in run.parent.disks if one.id == disk.id), None) if run.parent else None
    held = then.tail if then else ()
    layout = reader.call(layout_of, export, then.virtual_size if then else None)
    if export.bitmap is not None and reader.call(was_cut, export.address, layout, held):
        export, reason = replace(export, bitmap=None), CUT
        layout = reader.call(layout_of, export)
    whole = export.whole
    found = DiskArtifact(f"disk.{disk.id}.qcow2", layout, export.address, reader=reader)
    return found, Disk(
        id=disk.id,
        artifact=found.name,
        virtual_size=layout.virtual_size,
        whole=whole,
        reason=reason,
        path=disk.path,
        tail=tail(layout, () if whole else held),
    )


def estimate_of(domain: Domain, disk: SourceDisk, seen: Look) -> DiskEstimate:
    """How much a run would take of one disk, about; None where nothing tells."""
    name = seen.bitmaps.get(disk.id)
    if name is None:
        # libvirt cannot tell how much of a block device is in use. It opens the file, and a FIFO that somebody has put
        # there since the VM was started would hang it.
        size = domain.block_sizes(disk.id)[1] if disk.kind != "block" and not strange_kind(disk.path) else None
    else:
        size = next(bitmap.dirty for bitmap in seen.nodes[disk.id].bitmaps if bitmap.name == name)
    reason = seen.since.whole.get(disk.id, "") if seen.since else ""
    return DiskEstimate(id=disk.id, bytes=size, whole=name is None, reason=reason)
