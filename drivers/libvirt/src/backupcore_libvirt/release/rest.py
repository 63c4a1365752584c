"""Letting a guest go on that the run has brought to rest."""

from __future__ import annotations

import time

from backupcore.errors import BackupError, HypervisorError
from backupcore.thread import aside
from backupcore_libvirt.connection import Connection
from backupcore_libvirt.freeze import release
from backupcore_libvirt.libvirt_errors import is_away
from backupcore_libvirt.release.giving_up import Run
from backupcore_libvirt.release.loop import Loop

__all__ = ["Rest"]

LIMIT = 600.0
AGAIN = 0.2


class Rest:
    """The guest of a run at rest. `due` is when it has to go on at the latest, None where it is not at rest."""

    def __init__(self, run: Run, loop: Loop) -> None:
        self.due: float | None = None
        self.at_work = False
        """Whether it is just being let go on."""
        self._run = run
        self._loop = loop

    def end(self) -> None:
        """Let the guest go on if the run has brought it to rest; tried for ten minutes, whatever else is done."""
        self.due = None
        if self.at_work or not (self._run.scratch.path / "freeze").exists():
            return
        self.at_work = True
        aside(self._end, "thaw")

    def _end(self) -> None:
        deadline = time.monotonic() + LIMIT
        while True:
            try:
                with Connection(self._run.uri) as connection:
                    release(connection.domain(self._run.vm), self._run.scratch, deadline - time.monotonic())
            except HypervisorError as error:
                # libvirtd is being started anew, or was: a freeze outlives it, and a connection does not.
                if is_away(error) and time.monotonic() < deadline:
                    time.sleep(AGAIN)
                    continue
            except BackupError:
                pass  # the record stays, for the next run of the VM
            break
        self._loop.tell(self._ended)

    def _ended(self) -> None:
        self.at_work = False
