"""Threads that watch over a run and give it up in time, by `Context.fail`; they change nothing themselves."""

from __future__ import annotations

import threading

from backupcore.context import Context
from backupcore_libvirt.folder import RunFolder

__all__ = ["Watch", "stop_watches"]

STOP_LIMIT = 10.0  # a libvirt that hangs must not hold up the release


class Watch(threading.Thread):
    """One watch of the run in `folder` of a VM, over a connection of its own.

    `run` looks until `stop_asked` is set, or there is something to fail for.
    """

    def __init__(self, uri: str, vm_uuid: str, vm_name: str, folder: RunFolder, ctx: Context) -> None:
        super().__init__(name=f"{type(self).__name__}-{folder.run}", daemon=True)
        self.uri = uri
        self.vm_uuid = vm_uuid
        self.vm_name = vm_name
        self.folder = folder
        self.ctx = ctx
        self.stop_asked = threading.Event()

    def begin(self) -> None:
        """Start it; it ends with the run's context at the latest."""
        self.ctx.stack.callback(self.stop)
        self.start()

    def stop(self) -> None:
        """End it and wait for it. Idempotent."""
        self.stop_asked.set()
        # ctx.fail runs the callbacks of the run in this thread, and one of them may release the guest.
        if threading.current_thread() is not self and self.is_alive():
            self.join(STOP_LIMIT)


def stop_watches(run: str) -> None:
    """End what watches over this run in this process: a plugin keeps no state of a run, its threads are it."""
    for thread in threading.enumerate():
        if isinstance(thread, Watch) and thread.folder.run == run:
            thread.stop()
