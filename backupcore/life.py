"""Whether the process that has begun something still lives: a mark that it leaves beside what it has begun.

A process ID alone tells little: it is given again, another host has the same, and so has a container. So a mark names
the boot, the PID namespace and the moment at which the process began, too (proc(5)).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Life"]

_TEXT = re.compile(r"([0-9a-f]{32})-([0-9]{0,20})-([0-9]{1,20})-([0-9]{1,20})")


@dataclass(frozen=True, slots=True)
class Life:
    """One life of a process: the boot's ID, the number of its PID namespace, its ID there, and when it began.

    `boot` is 32 hex digits, `started` the kernel's own ticks since the boot; each is "" where it is not known. As text
    it is at most 96 letters that a file name may hold: hex digits and dashes.
    """

    boot: str
    namespace: str
    pid: int
    started: str

    def __str__(self) -> str:
        return f"{self.boot or '0' * 32}-{self.namespace}-{self.pid}-{self.started or 0}"

    @classmethod
    def of(cls, pid: int) -> Life:
        """That of a process of this host which is there now."""
        try:
            link = str(Path("/proc/self/ns/pid").readlink())
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            link = boot = ""
        return cls(boot.replace("-", ""), "".join(filter(str.isdigit, link)), pid, _started(pid))

    @classmethod
    def own(cls) -> Life:
        """That of this process."""
        return cls.of(os.getpid())

    @classmethod
    def parse(cls, text: str) -> Life | None:
        """What `str` has made; None for anything else."""
        found = _TEXT.fullmatch(text)
        return cls(found[1], found[2], int(found[3]), found[4]) if found else None

    def is_over(self, *, this_host: bool) -> bool:
        """Whether it has ended for certain.

        Of another boot it has only if it was of `this_host` for certain, which a host's name does not tell: two may
        have the same one. Of another PID namespace (a container's) nobody can tell.
        """
        now = Life.of(self.pid)
        if not self.boot.strip("0") or not now.boot:
            return False
        if self.boot != now.boot:
            return this_host
        known = self.namespace and self.started.strip("0")
        return bool(known) and self.namespace == now.namespace and self.started != now.started


def _started(pid: int) -> str:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()  # its name, in brackets, may hold anything
    return "" if fields[0] in "ZX" else fields[19]
