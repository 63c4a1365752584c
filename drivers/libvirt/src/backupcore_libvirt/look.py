"""All that can fail or wait is looked at here, before the guest is touched. Looking changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from backupcore.errors import Busy, HypervisorError, TargetFull, UnsupportedOperation
from backupcore.model import BackupRun, Consistency, LeftOut
from backupcore_libvirt.checkpoint import require_parent
from backupcore_libvirt.connection import IO_ERROR, OFF, PAUSED, RUNNING, Connection, Domain
from backupcore_libvirt.disks import DiskChoice, Node, SourceDisk, located, nodes, source_disks
from backupcore_libvirt.folder import Owner, RunFolder, check_scratch, require_room, scratch_room
from backupcore_libvirt.freeze import Freeze, plan
from backupcore_libvirt.owner import qemu_owner
from backupcore_libvirt.versions import require
from backupcore_libvirt.vm_files import VMFile, vm_files

__all__ = ["Look", "look"]


@dataclass(frozen=True, slots=True)
class Look:
    """What was found: the disks to back up, all disks by ID, those that get a bitmap, and what the run needs.

    `files` are what the VM consists of besides, `remarks` what its settings say in vain.
    """

    disks: tuple[SourceDisk, ...]
    all_disks: tuple[str, ...]
    tracked: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    nodes: Mapping[str, Node]
    freeze: Freeze
    owner: Owner
    files: tuple[VMFile, ...]
    remarks: tuple[str, ...]
    versions: Mapping[str, str]


def look(connection: Connection, domain: Domain, run: BackupRun, scratch: Path) -> Look:
    """Whether this run can be taken, and how.

    UnsupportedOperation, IncrementImpossible, Busy (a block job), TargetFull (scratch), AccessDenied, HypervisorError.
    A running backup job is not looked for here, see `backup_job.left_behind`.
    """
    consistency = _consistency(domain)
    versions = require(connection, domain)
    live = domain.live_xml()
    choice = DiskChoice.of(run.settings)
    every = tuple(located(domain, disk) for disk in source_disks(live, choice))
    disks = tuple(disk for disk in every if not disk.left_out)
    _refuse(domain, every, disks, choice)
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
    files, not_kept = vm_files(domain, connection.uri)
    return Look(
        disks=disks,
        all_disks=tuple(disk.id for disk in every),
        tracked=tracked,
        left_out=(*left_out, *not_kept),
        nodes=opened,
        freeze=plan(domain, live, run.settings, consistency),
        owner=owner,
        files=files,
        remarks=_in_vain(domain, every, choice),
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


def _in_vain(domain: Domain, every: Sequence[SourceDisk], choice: DiskChoice) -> tuple[str, ...]:
    """Disks that the settings name and the VM has not. A disk may have been detached, so that is no error."""
    here = {disk.id for disk in every}
    return tuple(
        f"VM {domain.name} has no disk {', '.join(sorted(named - here))}, which its setting {setting} names"
        for setting, named in (("EXCLUDE_DISKS", choice.excluded), ("VOLATILE_DISKS", choice.volatile))
        if named - here
    )


def _refuse(domain: Domain, every: Sequence[SourceDisk], disks: Sequence[SourceDisk], choice: DiskChoice) -> None:
    if not disks:
        reasons = "; ".join(f"{disk.id}: {disk.left_out}" for disk in every) or "it has none"
        raise UnsupportedOperation(f"VM {domain.name} has no disk that a backup could hold ({reasons})")
    for disk in disks:
        if disk.encrypted and not choice.plain_text:
            raise UnsupportedOperation(
                f"VM {domain.name}: disk {disk.id} is encrypted; QEMU shows what the guest sees, so its backup would "
                "hold it in plain text",
                f"Leave it out: vmkeep vm updateconf {domain.name} --exclude-disks {disk.id}; or, where the datastore "
                "may hold its contents: --encrypted-disks PLAIN",
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
