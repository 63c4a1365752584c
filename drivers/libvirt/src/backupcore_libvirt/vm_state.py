"""A VM as it is now, for host tooling: its state, its disks, and whether a backup reads them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

from backupcore.errors import BackupError, NotFound
from backupcore.hypervisor import VMDisk, VMState
from backupcore.model import VM
from backupcore_libvirt.connection import OFF, PAUSED, RUNNING, Domain
from backupcore_libvirt.disks import BY_RULE, DiskChoice, SourceDisk, source_disks
from backupcore_libvirt.image_size import by_header
from backupcore_libvirt.overlay import left
from backupcore_libvirt.overlay.stack import base_of, is_overlay
from backupcore_libvirt.qemu_nbd import is_served
from backupcore_libvirt.settings import read as read_settings

__all__ = ["choice_of", "state_of"]


def choice_of(domain: Domain, defaults: Mapping[str, str] | None) -> DiskChoice:
    """What its settings over `defaults` choose; None for what is left out by rule alone."""
    return BY_RULE if defaults is None else DiskChoice.of({**defaults, **read_settings(domain)})


def state_of(domain: Domain, backed_up: Collection[str], scratch: Path, choice: DiskChoice = BY_RULE) -> VMState:
    """The VM; `backed_up` are the UUIDs of those that a run backs up now. NotFound if it has just gone."""
    number, _ = domain.state()
    state: Literal["running", "paused", "off", "saved", "other"] = "other"
    if number == RUNNING:
        state = "running"
    elif number == PAUSED:
        state = "paused"
    elif number in OFF:
        state = "saved" if domain.is_saved() else "off"
    disks = tuple(
        VMDisk(
            id=disk.id,
            path=disk.path,
            format=disk.format,
            virtual_size=_virtual_size(domain, disk, live=number not in OFF) if not disk.left_out else None,
            left_out=disk.left_out,
            lies_on=base_of(disk.path) if is_overlay(disk.path) else "",
        )
        for disk in source_disks(domain.live_xml(), choice)
    )
    being_read = domain.uuid in backed_up
    if being_read and state in ("off", "saved") and any(is_overlay(disk.path) for disk in disks):
        being_read = any(is_served(disk.path) for disk in disks)  # what lies below an overlay keeps no VM from starting
    remarks = () if domain.uuid in backed_up else _remarks(domain, scratch)
    vm = VM(uuid=domain.uuid, name=domain.name)
    return VMState(vm=vm, state=state, disks=disks, being_read=being_read, remarks=remarks)


def _remarks(domain: Domain, scratch: Path) -> tuple[str, ...]:
    try:
        return tuple(left.remarks(domain, scratch))
    except NotFound:
        raise
    except BackupError as error:
        return (error.in_full,)  # the VM is listed all the same


def _virtual_size(domain: Domain, disk: SourceDisk, *, live: bool) -> int | None:
    # libvirt asks the QEMU of a running VM for all of its block nodes, which kills QEMU 7.2 in the moment in which
    # another program's backup or snapshot begins. A listing must not.
    if disk.format == "raw" and disk.source.part is not None:
        return disk.source.part.size
    size = by_header(disk.path, disk.format) if live and not disk.encrypted else None
    if size is not None:
        return size
    try:
        return domain.block_sizes(disk.id)[0]
    except BackupError:
        return None  # its file is missing or cannot be read by libvirt: the VM is listed all the same
