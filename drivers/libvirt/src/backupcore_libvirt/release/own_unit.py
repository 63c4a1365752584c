"""Leaving the owner's control group: a unit that systemd stops or kills takes every process of its group along."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

__all__ = ["OwnUnit"]

RUNNING = Path("/run/systemd/system")
"""There where systemd is the init system: sd_booted(3)."""
LIMIT = 2.0
_STOP_LIMIT = 15_000_000  # microseconds: at a shutdown nobody waits longer for it


class OwnUnit:
    """This process's way into a scope of its own, of the host's systemd, or of the user's.

    Asked for at once by systemd's own client, so that other work is done meanwhile; `wait` tells what came of it.
    """

    def __init__(self, run: str, running: Path = RUNNING) -> None:
        self._before = _group()
        self._unit = f"backupcore-guard-{run}.scope"
        self._child: subprocess.Popen[str] | None = None
        self._problem = ""
        if not running.is_dir():
            return
        manager = "org.freedesktop.systemd1"
        call = [manager, "/org/freedesktop/systemd1", f"{manager}.Manager", "StartTransientUnit"]
        about = ["Description", "s", f"lets the guest go on if backup run {run} does not"]
        properties = [*about, "PIDs", "au", "1", str(os.getpid()), "CollectMode", "s", "inactive-or-failed"]
        limit = ["TimeoutStopUSec", "t", str(_STOP_LIMIT)]
        bus = "--system" if os.geteuid() == 0 else "--user"
        command = ["busctl", bus, "--quiet", "call", *call, "ssa(sv)a(sa(sv))", self._unit, "fail", "4"]
        try:
            self._child = subprocess.Popen(
                [*command, *properties, *limit, "0"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        except OSError as error:
            self._problem = f"busctl: {error.strerror}"

    def wait(self) -> str:
        """Why this process is still in its owner's control group, or "": also where there is no systemd."""
        if self._child is None:
            return self._problem
        deadline = time.monotonic() + LIMIT
        try:
            _, said = self._child.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.communicate()
            return f"systemd has not answered within {LIMIT:.0f} s"
        if self._child.returncode:
            return " ".join(said.split()) or f"busctl ended with exit code {self._child.returncode}"
        while _group() == self._before:  # the answer says only that it was begun
            if time.monotonic() > deadline:
                return f"systemd has not started {self._unit} within {LIMIT:.0f} s"
            time.sleep(0.005)
        return ""


def _group() -> str:
    return Path("/proc/self/cgroup").read_text()
