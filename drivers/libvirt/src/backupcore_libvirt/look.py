"""All that can fail or wait is looked at here, before the guest is touched. Looking changes nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from backupcore.errors import Busy, HypervisorError, IncrementImpossible, TargetFull, UnsupportedOperation
from backupcore.model import BackupRun, Consistency, LeftOut
from backupcore_libvirt.checkpoint import Since, since
from backupcore_libvirt.connection import IO_ERROR, OFF, PAUSED, RUNNING, SHUTTING_DOWN, Connection, Domain
from backupcore_libvirt.disks import Node, SourceDisk, nodes, source_disks
from backupcore_libvirt.folder import Owner, RunFolder, check_scratch, require_room, scratch_room
from backupcore_libvirt.nvram import nvram_file
from backupcore_libvirt.owner import qemu_owner
from backupcore_libvirt.stopped import stopped_nodes
from backupcore_libvirt.versions import require, require_stopped
from backupcore_libvirt.xml import parse

__all__ = ["Look", "look"]


@dataclass(frozen=True, slots=True)
class Look:
    """What was found: the disks to back up, all disks by ID, those that get a bitmap, and what the run needs.

    `live` is whether QEMU runs for the VM, `since` is None for a full.
    """

    disks: tuple[SourceDisk, ...]
    all_disks: tuple[str, ...]
    tracked: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    nodes: Mapping[str, Node]
    live: bool
    since: Since | None
    consistency: Consistency
    owner: Owner
    nvram: Path | None
    versions: Mapping[str, str]

    @property
    def bitmaps(self) -> Mapping[str, str]:
        """The bitmap that tells what changed, for each disk that is not taken whole."""
        return dict.fromkeys(self.since.changed, self.since.name) if self.since else {}


def look(connection: Connection, domain: Domain, run: BackupRun, scratch: Path) -> Look:
    """Whether this run can be taken, and how.

    UnsupportedOperation, IncrementImpossible, Busy (a block job), TargetFull (scratch), AccessDenied, HypervisorError.
    A running backup job is not looked for here, see `backup_job.left_behind`.
    """
    live = domain.is_active()
    consistency = _consistency(domain)
    versions = require(connection, domain) if live else require_stopped(connection, domain)
    xml = domain.live_xml()
    every = source_disks(xml)
    disks = tuple(disk for disk in every if not disk.left_out)
    _refuse(domain, every, disks)
    opened = nodes(domain, disks) if live else stopped_nodes(domain.name, disks)
    snapshots = _snapshots(domain, opened)
    if snapshots and run.parent is not None:
        raise IncrementImpossible(
            f"VM {domain.name} has snapshots ({snapshots:.200}); reverting to one would hide changes from an increment"
        )
    # QEMU refuses to revert a disk that has bitmaps, so none are made beside snapshots.
    tracked = tuple(disk.id for disk in disks if disk.format == "qcow2") if run.tracked and not snapshots else ()
    for disk in disks:
        if disk.id in tracked and opened[disk.id].compat == "0.10":
            raise UnsupportedOperation(
                f"VM {domain.name}: disk {disk.id} is qcow2 version 2 (compat 0.10), which cannot track changed blocks",
                f"With the VM off: qemu-img amend -f qcow2 -o compat=1.1 {disk.path} (or take fulls only: MODE=FULL)",
            )
        if live and domain.block_job(disk.id):
            raise Busy(
                f"VM {domain.name}: a block job (commit, copy or pull) works on disk {disk.id}",
                f"Wait until it has ended ('virsh blockjob {domain.name} {disk.id}' shows it), then run it again.",
            )
    builds_on = since(domain, run.parent, disks, opened) if run.parent is not None else None
    RunFolder(scratch, run.id).check_length()
    # Of a VM that is off only we read, and nothing is written to scratch.
    owner = qemu_owner(xml, connection) if live else Owner(os.geteuid(), os.getegid())
    check_scratch(scratch, owner)
    if live:
        _require_room(domain, disks, opened, scratch)
    left_out = [LeftOut(id=disk.id, reason=disk.left_out) for disk in every if disk.left_out]
    if parse(xml).find("./devices/tpm") is not None:
        left_out.append(LeftOut(id="tpm", reason="the state of a TPM is not kept yet"))
    return Look(
        disks=disks,
        all_disks=tuple(disk.id for disk in every),
        tracked=tracked,
        left_out=tuple(left_out),
        nodes=opened,
        live=live,
        since=builds_on,
        consistency=consistency,
        owner=owner,
        nvram=nvram_file(domain.name, xml),
        versions=versions,
    )


def _consistency(domain: Domain) -> Consistency:
    state, reason = domain.state()
    if state == RUNNING:
        return "crash"
    if state == PAUSED and reason == IO_ERROR:
        raise HypervisorError(
            f"VM {domain.name}: QEMU has stopped the guest after an I/O error of one of its disks",
            f"Find the cause (a full file system? 'virsh domblkerror' says more), then: virsh resume {domain.name}",
        )
    if state == PAUSED:
        return "paused"
    if state in OFF:
        # What the guest had not yet written to its disks lies in the saved memory.
        return "crash" if domain.is_saved() else "off"
    if state == SHUTTING_DOWN:
        raise Busy(f"VM {domain.name} is shutting down", "Run it again once the VM is off.")
    raise UnsupportedOperation(
        f"VM {domain.name} is neither running, paused nor off (libvirt's state {state}); only such VMs can be backed up"
    )


def _refuse(domain: Domain, every: Sequence[SourceDisk], disks: Sequence[SourceDisk]) -> None:
    if not disks:
        reasons = "; ".join(f"{disk.id}: {disk.left_out}" for disk in every) or "it has none"
        raise UnsupportedOperation(f"VM {domain.name} has no disk that a backup could hold ({reasons})")
    for disk in disks:
        if disk.encrypted:
            raise UnsupportedOperation(
                f"VM {domain.name}: disk {disk.id} is encrypted; its backup would hold it in plain text"
            )


def _snapshots(domain: Domain, opened: Mapping[str, Node]) -> str:
    """The names of the VM's snapshots, those that only its disks know of among them; "" if it has none."""
    found = [*domain.snapshots(), *(name for node in opened.values() for name in node.snapshots)]
    return ", ".join(dict.fromkeys(found))


def _require_room(domain: Domain, disks: Sequence[SourceDisk], opened: Mapping[str, Node], scratch: Path) -> None:
    require_room(scratch)
    # With these policies QEMU does not stop a guest when scratch is full: its writes are lost.
    losing = [disk for disk in disks if disk.error_policy in ("report", "ignore")]
    needed = sum(opened[disk.id].virtual_size for disk in losing)
    free, kept = scratch_room(scratch)
    if losing and free < needed + kept:
        names = ", ".join(f"{disk.id} (error_policy={disk.error_policy!r})" for disk in losing)
        raise TargetFull(
            f"VM {domain.name}: if scratch filled up, the guest would lose writes to {names}; so {needed + kept} bytes "
            f"are needed in {scratch}, {free} are free",
            "Make room there, or remove error_policy from these disks: QEMU then stops the guest instead.",
        )
