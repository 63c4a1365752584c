"""Whose an upload under way is, and whether its process still lives: only what is dead and our own is swept.

A backup begins by writing `keys.UNFINISHED` beside its artifacts and ends by removing it. A process that was killed
leaves it, with parts that the store charges for and that no listing of objects shows.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from backupcore.model import BackupRun

__all__ = ["is_dead", "mark"]


def mark(run: BackupRun) -> bytes:
    """The mark of an upload of this process."""
    who = {"host": run.host, "installation": run.installation}
    return json.dumps({**who, "run": run.id, **_life(os.getpid())}, indent=1).encode()


def is_dead(marked: bytes, run: BackupRun) -> bool:
    """True if this mark is of the installation that takes `run`, and of a process that is gone for certain.

    A mark without an installation is of an older version; the host's name says whose it is.
    """
    try:
        said: dict[str, Any] = json.loads(marked)
        whose = said.get("installation")
        if (whose != run.installation) if whose else (said["host"] != run.host):
            return False
        boot, namespace, pid, started = (said[key] for key in ("boot", "namespace", "pid", "started"))
    except (ValueError, LookupError, TypeError, AttributeError):
        return False
    here = _life(os.getpid())
    if not (boot and here["boot"]) or not isinstance(pid, int):
        return False
    if boot != here["boot"]:
        return True
    # A container may have our host name, and processes that we cannot see.
    return bool(namespace) and namespace == here["namespace"] and started != _started(pid)


def _life(pid: int) -> dict[str, Any]:
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        namespace = boot = ""
    return {"boot": boot, "namespace": namespace, "pid": pid, "started": _started(pid)}


def _started(pid: int) -> str:
    """When a process began, in the kernel's own ticks since the boot; "" if there is none. IDs are used again."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()  # its name, in brackets, may hold anything
    return "" if fields[0] in "ZX" else fields[19]
