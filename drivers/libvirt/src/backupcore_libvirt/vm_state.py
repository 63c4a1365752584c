"""A VM as it is now, for host tooling: its state, its disks, and whether a backup reads them."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from pathlib import Path

from backupcore.errors import BackupError, NotFound
from backupcore.hypervisor import VMDisk, VMState
from backupcore.model import VM
from backupcore_libvirt.connection import Domain
from backupcore_libvirt.disks import BY_RULE, DiskChoice, SourceDisk, source_disks
from backupcore_libvirt.image_size import by_header, strange_kind
from backupcore_libvirt.overlay import left
from backupcore_libvirt.overlay.stack import base_of, is_overlay
from backupcore_libvirt.qemu_nbd import is_served
from backupcore_libvirt.settings import read as read_settings
from backupcore_libvirt.states import State

__all__ = ["choice_of", "state_of"]

MERGED_WITHIN = 1.0


def choice_of(domain: Domain, defaults: Mapping[str, str] | None) -> DiskChoice:
    """What its settings over `defaults` choose; None for what is left out by rule alone."""
    return BY_RULE if defaults is None else DiskChoice.of({**defaults, **read_settings(domain)})


def state_of(domain: Domain, backed_up: Collection[str], scratch: Path, choice: DiskChoice = BY_RULE) -> VMState:
    """The VM; `backed_up` are the UUIDs of those that a run backs up now. NotFound if it has just gone."""
    state = State.of(domain)
    off = state.name in ("off", "saved")
    disks = tuple(
        VMDisk(
            id=disk.id,
            path=disk.path,
            format=disk.format,
            virtual_size=_virtual_size(domain, disk) if not disk.left_out else None,
            left_out=disk.left_out,
            lies_on=base_of(disk.path) if is_overlay(disk.path) else "",
        )
        for disk in source_disks(domain.live_xml(), choice)
    )
    being_read = domain.uuid in backed_up
    if being_read and off and any(is_overlay(disk.path) for disk in disks):
        being_read = any(is_served(disk.path) for disk in disks)  # what lies below an overlay keeps no VM from starting
    remarks = () if domain.uuid in backed_up else _remarks(domain, scratch)
    vm = VM(uuid=domain.uuid, name=domain.name)
    return VMState(vm=vm, state=state.name, state_reason=state.why, disks=disks, being_read=being_read, remarks=remarks)


def _remarks(domain: Domain, scratch: Path) -> tuple[str, ...]:
    deadline = time.monotonic() + MERGED_WITHIN
    while True:
        try:
            return tuple(left.remarks(domain, scratch))
        except NotFound:
            raise
        except BackupError as error:
            # A merge that ends just now changes headers, and removes files that were there a moment ago.
            if time.monotonic() > deadline:
                return (error.in_full,)  # the VM is listed all the same
        time.sleep(0.05)


def _virtual_size(domain: Domain, disk: SourceDisk) -> int | None:
    # libvirt asks the QEMU of a running VM for all of its block nodes, which kills QEMU 7.2 in the moment in which
    # another program's backup or snapshot begins. Of one that is off it reads the file itself, and hangs for everybody
    # where that is a FIFO. A listing must cause neither.
    if disk.format == "raw" and disk.source.part is not None:
        return disk.source.part.size
    size = by_header(disk.path, disk.format) if not disk.encrypted else None
    if size is not None or strange_kind(disk.path):
        return size
    try:
        return domain.block_sizes(disk.id)[0]
    except BackupError:
        return None  # its file is missing or cannot be read by libvirt: the VM is listed all the same
