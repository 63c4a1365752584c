"""All that can fail or wait is looked at here, before the guest is touched. Looking changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from backupcore.errors import Busy, HypervisorError, TargetFull, UnsupportedOperation
from backupcore.model import BackupRun, Consistency, LeftOut
from backupcore_libvirt.checkpoint import require_parent
from backupcore_libvirt.connection import IO_ERROR, OFF, PAUSED, RUNNING, Connection, Domain
from backupcore_libvirt.disks import Node, SourceDisk, nodes, source_disks
from backupcore_libvirt.folder import Owner, RunFolder, check_scratch, require_room, scratch_room
from backupcore_libvirt.freeze import Freeze, plan
from backupcore_libvirt.nvram import nvram_file
from backupcore_libvirt.owner import qemu_owner
from backupcore_libvirt.versions import require
from backupcore_libvirt.xml import parse

__all__ = ["Look", "look"]


@dataclass(frozen=True, slots=True)
class Look:
    """What was found: the disks to back up, all disks by ID, those that get a bitmap, and what the run needs."""

    disks: tuple[SourceDisk, ...]
    all_disks: tuple[str, ...]
    tracked: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    nodes: Mapping[str, Node]
    freeze: Freeze
    owner: Owner
    nvram: Path | None
    versions: Mapping[str, str]


def look(connection: Connection, domain: Domain, run: BackupRun, scratch: Path) -> Look:
    """Whether this run can be taken, and how.

    UnsupportedOperation, IncrementImpossible, Busy (a block job), TargetFull (scratch), AccessDenied, HypervisorError.
    A running backup job is not looked for here, see `backup_job.left_behind`.
    """
    consistency = _consistency(domain)
    versions = require(connection, domain)
    live = domain.live_xml()
    every = source_disks(live)
    disks = tuple(disk for disk in every if not disk.left_out)
    _refuse(domain, every, disks)
    opened = nodes(domain, disks)
    _refuse_snapshots(domain, opened)
    tracked = tuple(disk.id for disk in disks if disk.format == "qcow2") if run.tracked else ()
    for disk in disks:
        if disk.id in tracked and opened[disk.id].compat == "0.10":
            raise UnsupportedOperation(
                f"VM {domain.name}: disk {disk.id} is qcow2 version 2 (compat 0.10), which cannot track changed blocks",
                f"With the VM off: qemu-img amend -f qcow2 -o compat=1.1 {disk.path} (or take fulls only: MODE=FULL)",
            )
        if domain.block_job(disk.id):
            raise Busy(
                f"VM {domain.name}: a block job (commit, copy or pull) works on disk {disk.id}",
                f"Wait until it has ended ('virsh blockjob {domain.name} {disk.id}' shows it), then run it again.",
            )
    if run.parent is not None:
        require_parent(domain, run.parent, disks, opened)
    RunFolder(scratch, run.id).check_length()
    owner = qemu_owner(live, connection)
    check_scratch(scratch, owner)
    _require_room(domain, disks, opened, scratch)
    left_out = [LeftOut(id=disk.id, reason=disk.left_out) for disk in every if disk.left_out]
    if parse(live).find("./devices/tpm") is not None:
        left_out.append(LeftOut(id="tpm", reason="the state of a TPM is not kept yet"))
    return Look(
        disks=disks,
        all_disks=tuple(disk.id for disk in every),
        tracked=tracked,
        left_out=tuple(left_out),
        nodes=opened,
        freeze=plan(domain, live, run.settings, consistency),
        owner=owner,
        nvram=nvram_file(domain.name, live),
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
        raise UnsupportedOperation(
            f"VM {domain.name} is powered off; only running VMs can be backed up as yet",
            f"Start it: virsh start {domain.name}",
        )
    raise UnsupportedOperation(
        f"VM {domain.name} is neither running nor paused (libvirt's state {state}); only such VMs can be backed up"
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


def _refuse_snapshots(domain: Domain, opened: Mapping[str, Node]) -> None:
    found = [*domain.snapshots(), *(name for node in opened.values() for name in node.snapshots)]
    if found:
        names = ", ".join(dict.fromkeys(found))
        raise UnsupportedOperation(
            f"VM {domain.name} has snapshots ({names:.200}); reverting to one would hide changes from the next backup, "
            "so VMs with snapshots are not backed up as yet",
            f"Delete them: virsh snapshot-delete {domain.name} SNAPSHOT",
        )


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
