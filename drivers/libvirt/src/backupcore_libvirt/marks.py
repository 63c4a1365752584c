"""Marks: by what a disk's image is known again, and by what it tells that it was cut off.

A bitmap has its checkpoint's name, which libvirt demands, so the bitmaps of all disks of a VM have the same: the file
of one disk that has come to the path of another looks just as healthy. So beside the bitmap of each point lies a second
one, the mark, whose name says the disk as well. It is disabled, so it costs the guest nothing and libvirt leaves it
alone, and it holds a single bit, that of the disk's last cluster. QEMU drops what lies behind the end when an image is
shrunk, and gives it back empty when that grows again: a mark without its bit is that of a disk that was cut off,
whatever was written to its end since.

Only a write sets a bit. So it comes from an empty image of the same size, on which nothing but that cluster is written.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from backupcore.errors import BackupError, HypervisorError, UnsupportedOperation
from backupcore_libvirt.connection import Domain
from backupcore_libvirt.disks import Node, SourceDisk
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.premade.one_bit import make_one_bit
from backupcore_libvirt.stopped import merge_bitmap, remove_bitmap

__all__ = ["add", "add_stopped", "remove_node"]

log = logging.getLogger("backupcore")

_SECTOR = 512
_BIT = "bit"
_PATIENCE = 3.0  # seconds


def add(domain: Domain, marks: Mapping[str, str], nodes: Mapping[str, Node], folder: RunFolder) -> frozenset[str]:
    """Put these marks, by disk ID, on the disks of a running VM; the disks that bear theirs then.

    Where its QEMU cannot do that a backup goes on without. `folder` is the run's: it says for whoever ends a killed run
    that the node may be there.
    """
    helper = _helper(folder)
    done: set[str] = set()
    by_size: dict[int, list[str]] = {}
    for disk in marks:
        by_size.setdefault(nodes[disk].virtual_size, []).append(disk)
    for size, disks in by_size.items():
        if size < _SECTOR:
            continue
        try:
            folder.note_marking()
            domain.query("blockdev-add", driver="null-co", **{"node-name": helper, "size": size})
            try:
                domain.query("block-dirty-bitmap-add", node=helper, name=_BIT)
                # QMP has no command that writes. To a node that keeps nothing this one is harmless.
                write = f'qemu-io {helper} "write -q -z {size - _SECTOR} {_SECTOR}"'
                domain.query("human-monitor-command", **{"command-line": write})
                _require_bit(domain, helper)
                for disk in disks:
                    _add(domain, nodes[disk].name, marks[disk], helper)
                    done.add(disk)
            finally:
                _remove(domain, helper)
            folder.end_marking()
        except HypervisorError as error:
            log.info("VM %s: its disks are backed up without a mark: %s", domain.name, error)
    return frozenset(done)


def remove_node(domain: Domain, folder: RunFolder) -> bool:
    """Remove the node by which a run made its marks, which was killed before it did that itself; whether it was there.

    One that QEMU does not let go of is logged: whoever ends a run has more to do.
    """
    helper = _helper(folder)
    try:
        if not any(node["node-name"] == helper for node in domain.query("query-named-block-nodes", flat=True)):
            return False
        _remove(domain, helper)
    except BackupError as error:  # a transient VM may be gone just now, too
        log.warning(
            "VM %s: its QEMU takes no internal snapshot until its next start, a block node of a backup is left: %s",
            domain.name,
            error,
        )
        return False
    return True


def _helper(folder: RunFolder) -> str:
    return f"backupcore-{folder.run[:16]}"  # a node's name has 31 characters at most


def _remove(domain: Domain, helper: str) -> None:
    """Remove the node; once more for a while where QEMU refuses it: beside it QEMU takes no internal snapshot."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            domain.query("blockdev-del", **{"node-name": helper})
        except HypervisorError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def _require_bit(domain: Domain, helper: str) -> None:
    """That the command has written: it says nothing where it has not, and an empty mark is that of a disk cut off."""
    nodes = domain.query("query-named-block-nodes", flat=True)
    found = [bitmap["count"] for node in nodes if node["node-name"] == helper for bitmap in node["dirty-bitmaps"]]
    if not any(found):
        raise HypervisorError(f"VM {domain.name}: QEMU has not written to a node of its own")


def _add(domain: Domain, node: str, name: str, helper: str) -> None:
    domain.query("block-dirty-bitmap-add", node=node, name=name, persistent=True, disabled=True)
    try:
        bit = {"node": helper, "name": _BIT}
        domain.query("block-dirty-bitmap-merge", node=node, target=name, bitmaps=[bit])
    except HypervisorError:
        with suppress(HypervisorError):  # the end of the run removes it, too
            domain.query("block-dirty-bitmap-remove", node=node, name=name)
        raise


def add_stopped(disks: Mapping[str, tuple[SourceDisk, int]], marks: Mapping[str, str], folder: Path) -> frozenset[str]:
    """The same on images that no VM has open: the disks, with their sizes. `folder` is the run's own."""
    done: set[str] = set()
    made: dict[int, Path] = {}
    try:
        for disk, name in marks.items():
            image, size = disks[disk]
            try:
                if size not in made:
                    path = folder / f"mark.{len(made)}.qcow2"
                    make_one_bit(path, size, _BIT)
                    made[size] = path
                merge_bitmap(image, name, made[size], _BIT)
            except (
                HypervisorError,
                UnsupportedOperation,
            ) as error:  # where it is in use, that is told as for the bitmap
                with suppress(BackupError):
                    remove_bitmap(image, name)
                log.info("disk %s (%s) is backed up without a mark: %s", disk, image.path, error)
            else:
                done.add(disk)
    finally:
        for path in made.values():
            path.unlink(missing_ok=True)
    return frozenset(done)
