"""Letting the guest go, in whichever way it is held: what needs no record of the run, and must not wait for one."""

from __future__ import annotations

import time
from collections.abc import Callable

from backupcore.errors import NotFound
from backupcore_libvirt.backup_job import end
from backupcore_libvirt.connection import Connection
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.release.servers import end_stray

__all__ = ["let_go", "merge_overlays"]

MERGE_LIMIT = 600.0


def let_go(uri: str, vm: str, folder: RunFolder) -> list[str]:
    """End the servers and the backup job of the run of this folder, and have the guest of `vm` (its UUID) go on.

    Returns what was done, a line each. Finds out what is there: idempotent, in any process, beside another one that
    does the same. Checkpoints and overlays stay, for `merge_overlays` and
    `choice.settle`: the guest goes on with them. HypervisorError where
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


def merge_overlays(
    uri: str, vm: str, folder: RunFolder, stop: Callable[[], bool], *, installation: str, undone: str = ""
) -> list[str]:
    """Merge the overlays that a run of `installation` has put on the disks of `vm` (its UUID) for its own time; a line
    for each.

    `undone` is the point of a run that was given up for good, and whose overlays were to stay between backups: they are
    merged back as well. The guest goes on in them meanwhile. Tried for ten minutes, or until `stop` says that somebody
    else does it. BackupError where something stays: the next run, or `recover`, merges it.
    """
    # Loaded only where it is needed: the guard of any other run starts without it.
    from backupcore.context import Context  # noqa: PLC0415
    from backupcore_libvirt.overlay import run  # noqa: PLC0415
    from backupcore_libvirt.overlay.left import merge_left  # noqa: PLC0415

    deadline = time.monotonic() + MERGE_LIMIT

    class Merging(Context):
        def check(self) -> None:
            if stop() or time.monotonic() > deadline:
                self.cancel()
            super().check()

    ctx = Merging(folder.path)
    with Connection(uri) as connection:
        try:
            domain = connection.domain(vm)
        except NotFound:
            return []
        merge_left(connection, domain, folder, ctx, installation)
        if undone:
            run.undo(connection, domain, undone, installation, folder=folder, ctx=ctx, check=ctx.check)
    return list(ctx.put_right)
