"""A process that lets a guest go on if the run that froze it does not: at a time limit, and when the run dies.

It is a process of its own, not a thread, since the run may be killed or stopped while the guest stands still. It is up
and connected before the guest is asked; it does nothing if it is told in time that all is well.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from backupcore.errors import BackupError, HypervisorError
from backupcore_libvirt.connection import Connection, Domain
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.libvirt_errors import is_away

__all__ = ["Watchdog", "main", "watchdog"]

START_LIMIT = 30.0
LET_GO_LIMIT = 600.0
AGAIN = 0.2
# -I and the parent's own path: the child must not import what lies in the current folder.
_CHILD = (
    "import json, sys; asked = json.loads(sys.stdin.readline()); sys.path[:] = asked['path']; "
    "from backupcore_libvirt.watchdog import main; main(asked)"
)


class Watchdog:
    """The process of one freeze."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._child = child

    def all_is_well(self) -> None:
        """The guest goes on: the process need not do anything. It may have, if the time is over."""
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):
            self._child.stdin.write("done\n")
            self._child.stdin.flush()


@contextmanager
def watchdog(uri: str, vm: str, folder: RunFolder, limit: float) -> Iterator[Watchdog]:
    """Watch over the freeze of a VM (its UUID) by the run of `folder`, from now on.

    Unless `Watchdog.all_is_well` is called within `limit` seconds and before the block ends, the process lets the guest
    go on, as the record in the folder says, and tries that for ten minutes. HypervisorError if it cannot be started.
    """
    child = subprocess.Popen(
        [sys.executable, "-I", "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        text=True,
        start_new_session=True,  # Ctrl-C is for the run
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        asked = {"uri": uri, "vm": vm, "scratch": str(folder.scratch), "run": folder.run, "limit": limit}
        with suppress(BrokenPipeError):  # it has ended already, and says nothing more
            child.stdin.write(json.dumps({"path": sys.path, **asked}) + "\n")
            child.stdin.flush()
        readable, _, _ = select.select([child.stdout], [], [], START_LIMIT)
        said = child.stdout.readline().strip() if readable else f"nothing within {START_LIMIT:.0f} s"
        if said != "ready":
            child.kill()
            raise HypervisorError(
                f"the process that watches over the freeze could not be started: {said or 'it ended'}"
            )
        yield Watchdog(child)
    finally:
        child.stdout.close()
        with suppress(BrokenPipeError):
            child.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            child.wait(1)  # else it is still at work, and stays until the guest goes on


def main(asked: dict[str, str]) -> None:
    """The process itself. All that it needs is there before it says that it is ready."""
    from backupcore_libvirt.freeze import release  # noqa: PLC0415 - it imports this module

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # what ends the run must not end this
    try:
        with Connection(asked["uri"]) as connection:
            connection.domain(asked["vm"])
            _say("ready")
            readable, _, _ = select.select([0], [], [], float(asked["limit"]))
            if readable and os.read(0, 16):
                return
            _let_go(connection, asked, release)
    except BackupError as error:  # once it was ready nobody listens; the record stays, for the next run of the VM
        _say(error.message)


def _let_go(connection: Connection, asked: dict[str, str], release: Callable[[Domain, RunFolder, float], bool]) -> None:
    deadline = time.monotonic() + LET_GO_LIMIT
    folder = RunFolder(Path(asked["scratch"]), asked["run"])
    with ExitStack() as stack:
        while True:
            try:
                release(connection.domain(asked["vm"]), folder, deadline - time.monotonic())
            except HypervisorError as error:
                # libvirtd is being started anew, or was: a freeze outlives it, and a connection does not.
                if not is_away(error) or time.monotonic() > deadline:
                    raise
            else:
                return
            time.sleep(AGAIN)
            with suppress(HypervisorError):
                connection = stack.enter_context(Connection(asked["uri"]))


def _say(text: str) -> None:
    with suppress(OSError):
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
