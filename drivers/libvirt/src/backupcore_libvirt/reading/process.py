"""The process that reads the disks of a run: one for all that the run does, forked from its guard.

So it needs no start of Python of its own, and whoever kills it to let the guest go knows it from the beginning.
"""

from __future__ import annotations

from backupcore.context import Context
from backupcore.disk.reader import Reader, pair
from backupcore_libvirt.connection import Domain
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.release.guard import Guard

__all__ = ["guarded", "reader_of"]

_SERVE = "backupcore.disk.reader.service:serve"


def guarded(uri: str, domain: Domain, folder: RunFolder, ctx: Context, installation: str) -> Guard:
    """The guard of a run of `installation`, with the process that shall read for it. Returns at once: both get ready
    meanwhile.
    """
    serve = (_SERVE, *pair())
    return Guard(uri, domain.uuid, domain.name, folder, ctx, installation=installation, serve=serve)


def reader_of(guard: Guard, ctx: Context) -> Reader:
    """The reader of a guarded run, once.

    It ends when the run is cancelled, lets go of the guest, or of its context. A run that begins anew, for a full
    instead of an increment, has let go of the guest before, and so gets another one.
    """
    guard.require_ready()
    assert guard.control is not None
    reader = Reader(guard.control, guard.reader, guard.name)
    ctx.stack.callback(reader.close)
    ctx.on_release(reader.close)
    ctx.stack.enter_context(ctx.on_cancel(reader.close))  # whoever waits for it is told
    return reader
