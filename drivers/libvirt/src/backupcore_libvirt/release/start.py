"""The first steps of the guard's process, before anything is imported that takes time, memory or a thread."""

from __future__ import annotations

import os
import signal
import socket
import sys
from contextlib import suppress
from importlib import import_module
from typing import Any

__all__ = ["main"]

_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_LEAST = -1000


def main(asked: dict[str, Any]) -> None:
    """Guard a run until all of it is released; see `backupcore_libvirt.release.process`."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)  # what ends the run must not end this
    reader = _fork(asked["serve"], int(asked["reader"])) if asked["serve"] else None
    # After the fork: the reader may take memory, and is no loss.
    # Pathlib would take time to import. An ordinary user may not have it lowered.
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:  # noqa: PTH123 - see above
        score.write(str(_LEAST))
    from backupcore_libvirt.release.process import guard  # noqa: PLC0415 - see above

    guard(asked, reader)


def _fork(serve: str, descriptor: int) -> int:
    """Start the process that reads the disks: ``MODULE:FUNCTION`` with its control socket; its number."""
    child = os.fork()
    if child:
        os.close(descriptor)
        return child
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 0)
        os.dup2(nowhere, 1)
        os.closerange(3, descriptor)
        os.closerange(descriptor + 1, 1 << 16)
        module, _, function = serve.partition(":")
        with socket.socket(fileno=descriptor) as control:
            getattr(import_module(module), function)(control)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it must not go on as a second guard
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(1)
    os._exit(0)
