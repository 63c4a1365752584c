"""What is taken of each disk: its artifact in a run, and the estimate of one."""

from __future__ import annotations

from dataclasses import replace

from backupcore.disk.qcow2 import DiskArtifact, Layout
from backupcore.disk.reader import Reader
from backupcore.model import BackupRun, Disk, DiskEstimate
from backupcore_libvirt.connection import Domain
from backupcore_libvirt.disks import SourceDisk
from backupcore_libvirt.image_size import strange_kind
from backupcore_libvirt.look import Look
from backupcore_libvirt.reading.cut import REASON as CUT
from backupcore_libvirt.reading.cut import has_lost_its_bit, tail, was_cut
from backupcore_libvirt.reading.export import Export, layout_of
from backupcore_libvirt.reading.probes import Probe, carried, chosen, digests, failed, places, worth_keeping

__all__ = ["estimate_of", "taken_of"]


def taken_of(disk: SourceDisk, export: Export, seen: Look, run: BackupRun, reader: Reader) -> tuple[DiskArtifact, Disk]:
    """The artifact of one disk: what changed, or all of it. Only the reader's process connects to the export."""
    reason = seen.since.whole.get(disk.id, "") if seen.since else ""
    then = next((one for one in run.parent.disks if one.id == disk.id), None) if run.parent else None
    layout = reader.call(layout_of, export, then.virtual_size if then else None)
    probes: tuple[Probe, ...] = ()
    if not export.whole and then is not None:
        reason, probes = _proved(export, layout, then, reader)
        if reason:
            export = replace(export, bitmap=None, depth=0)
            layout = reader.call(layout_of, export)
    if export.whole and run.tracked:
        probes = worth_keeping(reader.call(digests, export.address, places(layout), layout.virtual_size))
    found = DiskArtifact(f"disk.{disk.id}.qcow2", layout, export.address, reader=reader)
    return found, Disk(
        id=disk.id,
        artifact=found.name,
        virtual_size=layout.virtual_size,
        whole=export.whole,
        reason=reason,
        path=disk.path,
        tail=tail(layout, () if export.whole or then is None else then.tail),
        marked=export.marked,
        below=seen.below[disk.id],
        probes=probes,
    )


def _proved(export: Export, layout: Layout, then: Disk, reader: Reader) -> tuple[str, tuple[Probe, ...]]:
    """Why the changes since the parent are not believed, or ""; and the probes for the next backup.

    `layout` is what is said to have changed since.
    """
    if export.mark is not None and reader.call(has_lost_its_bit, export.address, export.mark):
        return CUT, ()
    # Where there is a mark it has told, of a running VM by what QEMU knows of it.
    if export.bitmap is not None and not then.marked and reader.call(was_cut, export.address, layout, then.tail):
        return CUT, ()
    old = carried(then.probes, layout)
    new = places(layout)
    if not then.probes:  # the parent was taken before there were any
        new += places(reader.call(layout_of, replace(export, bitmap=None, depth=0)))
    kept = chosen([offset for offset, _ in old], new)
    offsets = sorted({*kept, *(offset for offset, _ in old)})
    now = reader.call(digests, export.address, offsets, layout.virtual_size)
    return failed(old, now), worth_keeping({offset: now[offset] for offset in kept})


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
