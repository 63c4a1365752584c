"""All that can fail or wait is looked at here, before the guest is touched. Looking changes nothing."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from backupcore.errors import Busy, IncrementImpossible, UnsupportedOperation
from backupcore.model import BackupRun, LeftOut
from backupcore.typed import typed
from backupcore_libvirt.checkpoint import Since, mark_name, since
from backupcore_libvirt.connection import Connection, Domain
from backupcore_libvirt.disks import DiskChoice, Node, SourceDisk, away_at_the_start, located, nodes, source_disks
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.freeze import Freeze, plan
from backupcore_libvirt.owner import qemu_owner
from backupcore_libvirt.scratch import Owner, check_scratch
from backupcore_libvirt.stamps import Stamp, stamps_below
from backupcore_libvirt.states import State, consistency_of, stopped_by_an_error
from backupcore_libvirt.stopped import check_files, stopped_nodes
from backupcore_libvirt.versions import require, require_stopped
from backupcore_libvirt.vm_files import VMFile, vm_files

__all__ = ["Look", "look"]


@dataclass(frozen=True, slots=True)
class Look:
    """What was found: the disks to back up, all disks by ID, those that get a bitmap, and what the run needs.

    `live` is whether QEMU runs for the VM, `stopped` whether QEMU has stopped its guest after an I/O error, `since` is
    None for a full. `below` are the files below each disk. `files` are what the VM consists of besides,
    `remarks` what its settings say in vain.
    """

    disks: tuple[SourceDisk, ...]
    all_disks: tuple[str, ...]
    tracked: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    nodes: Mapping[str, Node]
    below: Mapping[str, tuple[Stamp, ...]]
    live: bool
    stopped: bool
    since: Since | None
    freeze: Freeze
    owner: Owner
    files: tuple[VMFile, ...]
    remarks: tuple[str, ...]
    versions: Mapping[str, str]

    @property
    def bitmaps(self) -> Mapping[str, str]:
        """The bitmap that tells what changed, for each disk that is not taken whole."""
        return dict.fromkeys(self.since.changed, self.since.name) if self.since else {}

    def mark_of(self, disk: str) -> str | None:
        """The parent's mark on this disk, if it bears one."""
        name = mark_name(self.since.name, disk) if self.since else None
        return name if any(bitmap.name == name for bitmap in self.nodes[disk].bitmaps) else None

    def narrowed(self, disks: Collection[str]) -> Look:
        """The same for these disks alone, by ID."""
        since = self.since and replace(self.since, changed=tuple(disk for disk in self.since.changed if disk in disks))
        return replace(self, disks=tuple(disk for disk in self.disks if disk.id in disks), since=since)


def look(connection: Connection, domain: Domain, run: BackupRun, scratch: Path) -> Look:
    """Whether this run can be taken, and how.

    UnsupportedOperation, IncrementImpossible, Busy (a block job), TargetFull (scratch), AccessDenied, HypervisorError.
    A running backup job is not looked for here, see `backup_job.left_behind`.
    """
    live = domain.is_active()
    consistency = consistency_of(domain)
    versions = require(connection, domain) if live else require_stopped(connection, domain)
    xml = domain.live_xml()
    choice = DiskChoice.of(run.settings)
    every = tuple(located(domain, disk) for disk in source_disks(xml, choice))
    disks = tuple(disk for disk in every if not disk.left_out)
    _refuse(domain, every, disks, choice, live=live)
    opened = nodes(domain, disks) if live else stopped_nodes(domain.name, disks)
    for disk in disks:
        if not opened[disk.id].virtual_size:
            raise UnsupportedOperation(
                f"VM {domain.name}: disk {disk.id} ({disk.path}) has 0 bytes",
                f"Leave it out: {typed('vmkeep vm updateconf', domain.name, '--exclude-disks', disk.id)}",
            )
    if not live:
        check_files(domain.name, disks, lambda: qemu_owner(xml, connection))
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
                "Take fulls only (MODE=FULL), or with the VM off: "
                f"{typed('qemu-img amend -f qcow2 -o compat=1.1', disk.path)}",
            )
        if live and domain.block_job(disk.id):
            raise Busy(
                f"VM {domain.name}: a block job (commit, copy or pull) works on disk {disk.id}",
                f"Run it again once that has ended. It is shown by: {typed('virsh blockjob', domain.name, disk.id)}",
            )
    # A running VM's definition tells what its QEMU has opened; of one that is off it must not say anything else.
    below = {disk.id: stamps_below(disk.path, disk.format, disk.source.below if live else ()) for disk in disks}
    builds_on = since(domain, run.parent, disks, opened, below) if run.parent is not None else None
    RunFolder(scratch, run.id).check_length()
    # Of a VM that is off only we read, and nothing is written to scratch.
    owner = qemu_owner(xml, connection) if live else Owner(os.geteuid(), os.getegid())
    check_scratch(scratch, owner)
    away = away_at_the_start(xml, domain.inactive_xml()) if live and domain.is_persistent() else ()
    left_out = [
        LeftOut(id=disk.id, reason=disk.left_out, missed=disk.missed)
        for disk in (*every, *away)
        if disk.left_out and not (disk in away and disk.id in choice.excluded)
    ]
    files, not_kept = vm_files(domain, connection.uri)
    return Look(
        disks=disks,
        all_disks=tuple(disk.id for disk in every),
        tracked=tracked,
        left_out=(*left_out, *not_kept),
        nodes=opened,
        below=below,
        live=live,
        stopped=stopped_by_an_error(domain),
        since=builds_on,
        freeze=plan(domain, xml, run.settings, consistency, State.of(domain) if live else None),
        owner=owner,
        files=files,
        remarks=_in_vain(domain, every, choice),
        versions=versions,
    )


def _in_vain(domain: Domain, every: Sequence[SourceDisk], choice: DiskChoice) -> tuple[str, ...]:
    """Disks that the settings name and the VM has not. A disk may have been detached, so that is no error."""
    here = {disk.id for disk in every}
    return tuple(
        f"VM {domain.name} has no disk {', '.join(sorted(named - here))}, which its setting {setting} names"
        for setting, named in (("EXCLUDE_DISKS", choice.excluded), ("VOLATILE_DISKS", choice.volatile))
        if named - here
    )


def _refuse(
    domain: Domain, every: Sequence[SourceDisk], disks: Sequence[SourceDisk], choice: DiskChoice, *, live: bool
) -> None:
    if not disks:
        reasons = "; ".join(f"{disk.id}: {disk.left_out}" for disk in every) or "it has none"
        raise UnsupportedOperation(f"VM {domain.name} has no disk that a backup could hold ({reasons})")
    for disk in disks:
        if not disk.encrypted:
            continue
        without = f"Leave it out: {typed('vmkeep vm updateconf', domain.name, '--exclude-disks', disk.id)}; or"
        if not live:
            told = (
                ""
                if choice.plain_text
                else ", and say --encrypted-disks PLAIN where the datastore may hold its contents"
            )
            raise UnsupportedOperation(
                f"VM {domain.name} is off, and disk {disk.id} is encrypted; only the QEMU of a running VM has its key",
                f"{without} start the VM{told}",
            )
        if not choice.plain_text:
            raise UnsupportedOperation(
                f"VM {domain.name}: disk {disk.id} is encrypted; QEMU shows what the guest sees, so its backup would "
                "hold it in plain text",
                f"{without}, where the datastore may hold its contents: --encrypted-disks PLAIN",
            )


def _snapshots(domain: Domain, opened: Mapping[str, Node]) -> str:
    """The names of the VM's snapshots, those that only its disks know of among them; "" if it has none."""
    found = [*domain.snapshots(), *(name for node in opened.values() for name in node.snapshots)]
    return ", ".join(dict.fromkeys(found))
