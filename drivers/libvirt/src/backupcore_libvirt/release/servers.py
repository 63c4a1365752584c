"""Ending the `qemu-nbd` of a run whose process does not: found by looking, without libvirt and without the run."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from backupcore.errors import HypervisorError

__all__ = ["end_stray", "processes"]

STOP_LIMIT = 5.0


def end_stray(folder: Path) -> bool:
    """Kill every qemu-nbd whose socket lies in `folder`, and wait for its end: a dead run's. Whether there was one.

    They are found by their command lines, since the number of a process may meanwhile be another's.
    """
    found = [pid for pid in processes() if _serves(pid, folder)]
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + STOP_LIMIT
    while any(_serves(pid, folder) for pid in found):
        if time.monotonic() > deadline:
            raise HypervisorError(f"qemu-nbd (process {found[0]}) with a socket in {folder} cannot be ended")
        time.sleep(0.01)
    return bool(found)


def processes() -> list[int]:
    """The numbers of all processes."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - names, not paths


def _serves(pid: int, folder: Path) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False  # it has ended, or is not ours to look at
    if not command or not command[0].endswith((b"qemu-nbd", b"setpriv")):
        return False
    start = b"--socket=" + os.fsencode(folder) + b"/"
    return any(argument.startswith(start) for argument in command)
