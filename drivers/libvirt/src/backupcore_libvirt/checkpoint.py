"""Checkpoints: the points from which changed blocks are tracked, by libvirt's record and by QEMU's bitmaps.

The two are two truths: after a crash of QEMU libvirt still lists checkpoints whose bitmaps were never written. So a
parent counts only where both agree, on every disk.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

from backupcore.errors import BackupError, HypervisorError, IncrementImpossible
from backupcore.model import Link
from backupcore_libvirt.connection import NO_CHECKPOINT, Domain, code_of
from backupcore_libvirt.disks import Node, SourceDisk, nodes, source_disks
from backupcore_libvirt.xml import parse

__all__ = ["checkpoint_name", "checkpoint_xml", "delete", "ours", "require_parent"]

OFFLINE_LIMIT = 5.0


def checkpoint_name(point: str) -> str:
    """The checkpoint of a point; bitmaps have its name too."""
    return f"backupcore-{point}"


def ours(domain: Domain) -> list[str]:
    """The points of every checkpoint of ours that libvirt knows on this VM."""
    prefix = checkpoint_name("")
    return [name.removeprefix(prefix) for name in domain.checkpoints() if name.startswith(prefix)]


def checkpoint_xml(point: str, vm_disks: Sequence[str], tracked: Collection[str]) -> str | None:
    """The ``<domaincheckpoint>`` of a run, with a bitmap on each disk of `tracked`; None if there is none to make.

    Every disk of the VM is listed: for one that is not, libvirt decides, and it would accept a checkpoint of no disk.
    """
    if not tracked:
        return None
    name = checkpoint_name(point)
    root = Element("domaincheckpoint")
    SubElement(root, "name").text = name
    listed = SubElement(root, "disks")
    for disk in vm_disks:
        kind = {"checkpoint": "bitmap", "bitmap": name} if disk in tracked else {"checkpoint": "no"}
        SubElement(listed, "disk", {"name": disk} | kind)
    return tostring(root, encoding="unicode")


def require_parent(domain: Domain, parent: Link, disks: Sequence[SourceDisk], opened: Mapping[str, Node]) -> None:
    """That every one of `disks` can tell what changed since `parent`. IncrementImpossible with the reason."""
    sizes = {disk.id: disk.virtual_size for disk in parent.disks}
    for disk in disks:
        if disk.format == "raw":
            raise IncrementImpossible(
                f"disk {disk.id} is raw; changed blocks are tracked in qcow2 only",
                f"For increments convert it, with the VM off: qemu-img convert -O qcow2 {disk.path} …",
            )
        if disk.id not in sizes:
            raise IncrementImpossible(f"disk {disk.id} was added since the last backup")
        size = opened[disk.id].virtual_size
        if size < sizes[disk.id]:
            # Its bitmap looks healthy, but what lay behind the cut is stale.
            raise IncrementImpossible(f"disk {disk.id} has shrunk from {sizes[disk.id]} to {size} bytes")
    name = checkpoint_name(parent.point)
    try:
        checkpoint = parse(domain.checkpoint_xml(name))
    except BackupError as error:
        if code_of(error) != NO_CHECKPOINT:
            raise
        raise IncrementImpossible(f"libvirt does not know the checkpoint {name} of the last backup") from error
    covered = {
        entry.get("name"): entry.get("bitmap") or name
        for entry in checkpoint.iterfind("./disks/disk")
        if entry.get("checkpoint") == "bitmap"
    }
    then = checkpoint.find("domain")
    sources = {d.id: d.path for d in source_disks(tostring(then, encoding="unicode"))} if then is not None else {}
    for disk in disks:
        if disk.id not in covered:
            raise IncrementImpossible(f"disk {disk.id} is not covered by the checkpoint {name} of the last backup")
        if disk.id in sources and sources[disk.id] != disk.path:
            # Another image under the same target, two disks swapped, or an overlay: its bitmap counts other changes.
            raise IncrementImpossible(
                f"disk {disk.id} is now {disk.path}, at the last backup it was {sources[disk.id]}"
            )
        bitmap = next((b for b in opened[disk.id].bitmaps if b.name == covered[disk.id]), None)
        if bitmap is None:
            raise IncrementImpossible(
                f"the bitmap of the last backup is missing on disk {disk.id}; QEMU has probably crashed since"
            )
        if not bitmap.usable:
            state = "inconsistent; QEMU has probably crashed since" if bitmap.inconsistent else "not recording"
            raise IncrementImpossible(f"the bitmap of the last backup on disk {disk.id} is {state}")


def delete(domain: Domain, points: Sequence[str]) -> None:
    """Delete the checkpoints of these points with their bitmaps, whether the VM runs or not; absent ones are skipped.

    Children stay: other chains' checkpoints may hang below these in libvirt's tree. HypervisorError where one stays.
    """
    known = set(domain.checkpoints())
    errors: list[HypervisorError] = []
    for name in (checkpoint_name(point) for point in points):
        if name in known:
            try:
                _delete(domain, name)
            except HypervisorError as error:  # the others can go all the same
                errors.append(error)
    if errors:
        raise errors[0]


def _delete(domain: Domain, name: str) -> None:
    if domain.is_active():
        try:
            domain.delete_checkpoint(name)
        except HypervisorError:
            if domain.is_active():
                if not _delete_in_pieces(domain, name):
                    raise
                return
        else:
            return
    _delete_offline(domain, name)


def _delete_in_pieces(domain: Domain, name: str) -> bool:
    """Delete a checkpoint that has lost a bitmap, which libvirt refuses to do; False if it has lost none."""
    covered = _covered(domain, name)
    running = [disk for disk in source_disks(domain.live_xml()) if disk.id in covered and not disk.left_out]
    found = nodes(domain, running)
    left = [node for node in found.values() if any(bitmap.name == name for bitmap in node.bitmaps)]
    if len(left) == len(found):
        return False
    for node in left:
        domain.query("block-dirty-bitmap-remove", node=node.name, name=name)
    domain.delete_checkpoint(name, metadata_only=True)
    return True


def _covered(domain: Domain, name: str) -> set[str]:
    listed = parse(domain.checkpoint_xml(name)).iterfind("./disks/disk")
    return {entry.get("name", "") for entry in listed if entry.get("checkpoint") == "bitmap"}


def _delete_offline(domain: Domain, name: str) -> None:
    # libvirt deletes bitmaps of running VMs only; for others it can just forget them, and they would stay in the image.
    covered = _covered(domain, name)
    for disk in source_disks(domain.inactive_xml()):
        if disk.id in covered and disk.format == "qcow2" and disk.kind in ("file", "block"):
            _remove_bitmap(disk.path, name)
    domain.delete_checkpoint(name, metadata_only=True)


def _remove_bitmap(path: str, name: str) -> None:
    command = ["qemu-img", "bitmap", "--remove", "-f", "qcow2", path, name]
    deadline = time.monotonic() + OFFLINE_LIMIT
    while True:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise HypervisorError(f"qemu-img, to remove bitmap {name} from {path}: {error.strerror}") from error
        if done.returncode == 0 or "not found" in done.stderr or "No such file" in done.stderr:
            return
        if "lock" not in done.stderr or time.monotonic() > deadline:  # a QEMU that ends holds its lock for a moment
            raise HypervisorError(f"remove bitmap {name} from {path}: {done.stderr.strip()}")
        time.sleep(0.1)
