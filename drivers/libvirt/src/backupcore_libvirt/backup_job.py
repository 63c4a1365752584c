"""libvirt's backup job: begin it, find one that runs, end it without harm to the guest."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, tostring

from backupcore.errors import BackupError, Busy, HypervisorError, NotFound
from backupcore.typed import typed
from backupcore_libvirt.connection import BACKUP, IO_ERROR, NO_JOB, PAUSED, Domain
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.libvirt_errors import code_of
from backupcore_libvirt.marks import remove_node
from backupcore_libvirt.place.job_socket import remove_sockets
from backupcore_libvirt.release.clients import wait_until_alone
from backupcore_libvirt.xml import parse

__all__ = ["Job", "backup_xml", "bitmap_name", "end", "left_behind", "running"]

BEGIN_LIMIT = 10.0
ORPHANS_LIMIT = 3.0
CLIENTS_LIMIT = 10.0
END_LIMIT = 120.0
AGAIN_EVERY = 5.0
_OPERATIONS = ("", "start", "save", "restore", "migration", "migration", "snapshot", "revert", "dump", "backup")


def bitmap_name(disk: str) -> str:
    """The name under which the export shows a disk's changed blocks (``qemu:dirty-bitmap:NAME``)."""
    return f"backup-{disk}"


@dataclass(frozen=True, slots=True)
class Job:
    """A running backup job: its socket ("" where it has none), and its scratch files."""

    socket: str
    files: tuple[str, ...]


def backup_xml(disks: Sequence[str], folder: RunFolder, socket: Path, since: Mapping[str, str]) -> str:
    """The ``<domainbackup>`` of a run: these disks and no other, those in `since` since that checkpoint."""
    root = Element("domainbackup", mode="pull")
    SubElement(root, "server", transport="unix", socket=str(socket))
    listed = SubElement(root, "disks")
    for disk in disks:
        parent = since.get(disk)
        mode = {"backupmode": "incremental", "incremental": parent} if parent else {"backupmode": "full"}
        names = {"exportname": disk} | ({"exportbitmap": bitmap_name(disk)} if parent else {})
        element = SubElement(listed, "disk", {"name": disk, "backup": "yes", "type": "file"} | mode | names)
        # libvirt makes up no scratch file for raw and block disks, and one beside the image for others. The format is
        # said, since these are there already.
        SubElement(element, "driver", type="qcow2")
        SubElement(element, "scratch", file=str(folder.disk(disk)))
    return tostring(root, encoding="unicode")


def running(domain: Domain) -> Job | None:
    """The running backup job, None if there is none."""
    try:
        found = parse(domain.backup_xml())
    except BackupError as error:
        if code_of(error) == NO_JOB:
            return None
        raise
    server = found.find("server")
    files = [scratch.get("file", "") for scratch in found.iterfind("./disks/disk/scratch")]
    return Job(server.get("socket", "") if server is not None else "", tuple(files))


def left_behind(domain: Domain, scratch: Path) -> RunFolder | None:
    """The folder of a dead run of ours whose job is still there, for `end`; None if the VM is free for a backup.

    Busy where another job runs, or a run of ours that lives: at once, since libvirt itself would wait 30 s for it.
    """
    if not domain.is_active() or not _job_type(domain):
        return None
    deadline = time.monotonic() + ORPHANS_LIMIT
    while True:
        operation = domain.job_operation()
        job = running(domain) if operation in (0, BACKUP) else None
        # The guard of a dead run may just be ending its job: libvirt then says what it was no more, and soon nothing.
        if job is not None or operation not in (0, BACKUP) or time.monotonic() > deadline:
            break
        if not _job_type(domain):
            return None
        time.sleep(0.02)
    folder = RunFolder.of_job(scratch, job.socket, job.files) if job else None
    if job is None or folder is None:
        what = _OPERATIONS[operation] if operation < len(_OPERATIONS) and operation else "unknown"
        holder = f", its socket is {job.socket}" if job and job.socket else ""
        raise Busy(
            f"VM {domain.name}: another job is running (operation: {what}{holder})",
            "Wait until it has ended ('virsh domjobinfo' shows it), then run it again.",
        )
    busy = Busy(
        f"VM {domain.name}: another backup of this VM is running (its socket is {job.socket})",
        "Wait until it has ended, then run it again.",
    )
    if folder.is_in_use():
        raise busy
    try:
        # The children of a run that was killed end a moment later, and QEMU notices that later still.
        wait_until_alone(Path(job.socket), ORPHANS_LIMIT)
    except HypervisorError as error:
        raise busy from error
    return folder


def _job_type(domain: Domain) -> int:
    """The kind of job that runs, 0 if none; a backup that is just beginning is waited for."""
    deadline = time.monotonic() + BEGIN_LIMIT
    while True:
        try:
            return domain.job_type()
        except HypervisorError as error:
            # What libvirt says while a backup begins: for some tenths of a second, and no longer.
            if "backup job data missing" not in error.message:
                raise
            if time.monotonic() > deadline:
                # libvirtd was killed in that time: nothing in its API gets rid of that job.
                raise HypervisorError(
                    f"VM {domain.name}: libvirt holds a backup job that no longer exists ({error.message})",
                    "libvirtd was killed while a backup began. Power the VM off and restart libvirtd; or stop it, "
                    "remove the line \"<job type='none' async='backup' …/>\" from "
                    f"/run/libvirt/qemu/{domain.name}.xml and start it.",
                ) from error
        time.sleep(0.02)


def end(domain: Domain, folder: RunFolder) -> list[str]:
    """End the job of this folder, if it runs, and let the guest go on if the job had stopped it. Idempotent.

    Returns what it did, a line each.

    QEMU's main loop hangs for ever if the job is aborted while an NBD client is between connecting and its first
    request, and libvirt with it; so nobody may be connected. HypervisorError if somebody stays, or the job does not
    end.
    """
    did = []
    # One at a time: between the look and the abort another process could end this job and begin one of its own.
    with folder.sole(END_LIMIT + CLIENTS_LIMIT) as started:
        if domain.is_active():
            _job_type(domain)  # a job that is just beginning has no socket yet: wait for it
        job = running(domain)
        found = RunFolder.of_job(folder.scratch, job.socket, job.files) if job else None
        if job is not None and found is not None and found.run == folder.run:
            wait_until_alone(Path(job.socket), CLIENTS_LIMIT)
            folder.remove_scratch()
            domain.abort_job()
            _wait_for_end(domain, Path(job.socket))
            did.append("ended a backup job")
        if started and domain.state() == (PAUSED, IO_ERROR) and not folder.was_stopped:
            # QEMU stopped it when a scratch file could not grow; without the job the stopped write is done again.
            domain.resume()
            did.append("let the guest go on, which QEMU had stopped after an I/O error")
        if started and domain.is_active():
            if folder.is_marking and remove_node(domain, folder):
                did.append("removed the block node by which marks are made")
            remove_sockets(domain, folder)
        if started:
            folder.remove_scratch()  # whoever owns the run may hang for hours: others need that room
    return did


def _not_ended(domain: Domain) -> HypervisorError:
    """The error of a job that goes on; what is to be done hangs on whether QEMU still answers."""
    later = f"{typed('vmkeep recover', domain.name)} (or the next backup) ends it"
    try:
        status = domain.query("query-status")["status"]
    except BackupError as error:
        return HypervisorError(
            f"VM {domain.name}: the backup job has not ended {END_LIMIT:.0f} s after it was asked to, and QEMU does "
            f"not answer ({error.message})",
            f"Does the guest itself still answer? Then leave it alone: {later}. If it stands still for good, only "
            f"{typed('virsh destroy', domain.name)} is left, which is as pulling its plug.",
        )
    return HypervisorError(
        f"VM {domain.name}: the backup job has not ended {END_LIMIT:.0f} s after it was asked to; QEMU answers, and "
        f"says {status}",
        f"The guest does not stand still for that: leave it alone. {later}.",
    )


def _wait_for_end(domain: Domain, socket: Path) -> None:
    # abortJob returns before the end; until then further calls meet "in use".
    deadline = time.monotonic() + END_LIMIT
    again = time.monotonic() + AGAIN_EVERY
    while True:
        try:
            if not domain.job_type():
                return
        except NotFound:
            return  # a transient VM that ended
        except Busy:
            # libvirt has waited 30 s for itself. QEMU's job has ended by then, and libvirt takes the scratch files out
            # of the VM's AppArmor profile, one by one; it compiles that anew for each, and answers nobody meanwhile.
            pass
        except HypervisorError:
            if not domain.is_active():
                return
            raise
        if time.monotonic() > deadline:
            raise _not_ended(domain)
        if time.monotonic() > again:
            # Of a disk that the guest has given back meanwhile libvirt waits for a job that it did not end; asked
            # again, it ends (9.0).
            again = time.monotonic() + AGAIN_EVERY
            wait_until_alone(socket, CLIENTS_LIMIT)
            with suppress(BackupError):  # it has just ended, or libvirt is still at it
                domain.abort_job()
        time.sleep(0.01)
