"""Letting the guest go, in whichever way it is held: what needs no record of the run, and must not wait for one."""

from __future__ import annotations

from backupcore.errors import NotFound
from backupcore_libvirt.backup_job import end
from backupcore_libvirt.connection import Connection
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.release.servers import end_stray

__all__ = ["let_go"]


def let_go(uri: str, vm: str, folder: RunFolder) -> list[str]:
    """End the servers and the backup job of the run of this folder, and have the guest of `vm` (its UUID) go on.

    Returns what was done, a line each. Finds out what is there: idempotent, in any process, beside another one that
    does the same. Checkpoints and overlays stay, for `choice.settle`: they cost a guest nothing. HypervisorError where
    it would do harm, or did not succeed.
    """
    did = []
    if end_stray(folder.path):  # first: a VM that is off can then start, also while libvirtd is away
        did.append("ended the servers of its disks")
    with Connection(uri) as connection:
        try:
            domain = connection.domain(vm)
        except NotFound:
            return did  # a transient VM that has ended, or one that was undefined: nothing of it is held
        return did + end(domain, folder)
