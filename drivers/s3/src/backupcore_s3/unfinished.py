"""Whose an upload under way is, and whether its process still lives: only what is dead and our own is swept.

A backup begins by writing `keys.UNFINISHED` beside its artifacts and ends by removing it. A process that was killed
leaves it, with parts that the store charges for and that no listing of objects shows.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from backupcore.life import Life
from backupcore.model import BackupRun

__all__ = ["is_dead", "mark"]


def mark(run: BackupRun) -> bytes:
    """The mark of an upload of this process."""
    who = {"host": run.host, "installation": run.installation}
    return json.dumps({**who, "run": run.id, **asdict(Life.own())}, indent=1).encode()


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
    if not isinstance(pid, int) or not all(isinstance(one, str) for one in (boot, namespace, started)):
        return False
    # Older versions wrote "pid:[4026531836]", and the boot's ID with its dashes.
    number = "".join(filter(str.isdigit, namespace))
    return Life(boot.replace("-", ""), number, pid, started).is_over(this_host=True)
