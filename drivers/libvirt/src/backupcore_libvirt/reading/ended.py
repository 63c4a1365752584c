"""What is said where the backup job is not there any more whose disks are about to be read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from backupcore.context import Context
from backupcore.disk.nbd import ConnectionLost
from backupcore.errors import BackupError, HypervisorError
from backupcore_libvirt.backup_job import running
from backupcore_libvirt.connection import Domain
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.reading.export import Export
from backupcore_libvirt.release.watching import vm_ended

__all__ = ["job_expected"]


@contextmanager
def job_expected(domain: Domain, folder: RunFolder, exports: Mapping[str, Export], ctx: Context) -> Iterator[None]:
    """Where a connection to an export of this run's job is lost in the block, say so if the job has ended.

    What was lost is then told in words of the VM, not of a socket. Exports of `qemu-nbd` are read without a leave, and
    tell for themselves.
    """
    try:
        yield
    except ConnectionLost as error:
        ctx.check()  # the run was given up, and its connections with it
        if not all(export.address.admission for export in exports.values()):
            raise
        try:
            why = _ended(domain, folder)
        except BackupError:  # libvirt does not answer either
            why = None
        if why is None:
            raise
        raise why from error


def _ended(domain: Domain, folder: RunFolder) -> HypervisorError | None:
    if not domain.is_active():
        return vm_ended(domain.name)
    job = running(domain)
    found = RunFolder.of_job(folder.scratch, job.socket, job.files) if job is not None else None
    if found is not None and found.run == folder.run:
        return None
    return HypervisorError(
        f"VM {domain.name}: its backup job was ended by somebody else before the disks were read",
        "Another program, or a person, has ended it as 'virsh domjobabort' does: find out who, then run it again.",
    )
