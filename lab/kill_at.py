"""Run a Python program and end it, or stop it, at one exact step: a debugger's breakpoint that kills.

    python -m lab.kill_at STEP MODULE ARGUMENTS…

STEP names a function as ``module:Qualified.name`` and says when: ``call`` (its first line) or ``return`` (also of an
error, and of each yield), for example ``backupcore_libvirt.connection:Domain.begin_backup return``. The process ends by
SIGKILL, as from ``kill -9``; with ``LAB_AT=stop`` it stops by SIGSTOP instead, so that a test can act at that moment,
and ``LAB_AT=interrupt`` is a Ctrl-C.
With ``LAB_PASS=2`` the step is let pass twice before.

With ``LAB_CHILD=STEP`` the Python processes that the program starts (the guard of a run, whoever reads its disks, a
file view) end at that step, whichever comes to it; ``LAB_CHILD_AT=stop`` stops them. STEP may be "" for the program.

The program is not changed: Python's own profiler hook tells each call. A step that is never reached lets the program
end by itself, which a test notices.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any


def arm(step: str, how: str = "LAB_AT") -> None:
    """End this process at the step, in whichever thread it happens. `how` names the variable that says "stop"."""
    name, _, when = step.rpartition(" ")
    module, _, function = name.partition(":")
    if not function or when not in ("call", "return"):
        raise SystemExit(f"{step!r} is no step: MODULE:FUNCTION call, or return")
    numbers = {"stop": signal.SIGSTOP, "interrupt": signal.SIGINT}
    number = numbers.get(os.environ.get(how, ""), signal.SIGKILL)
    left = int(os.environ.get("LAB_PASS", "0"))
    lock = threading.Lock()

    def watch(frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal left
        if event != when or frame.f_code.co_qualname != function or frame.f_globals.get("__name__") != module:
            return
        with lock:
            left -= 1
            reached = left == -1
        if reached:
            os.kill(os.getpid(), number)

    threading.setprofile(watch)
    sys.setprofile(watch)


def main() -> None:
    step, module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    if os.environ.get("LAB_CHILD"):
        os.environ["LAB_PYTHON"] = sys.executable
        os.environ["LAB_ROOT"] = str(Path(__file__).parent.parent)
        sys.executable = str(Path(__file__).with_name("armed-python"))
    if step:
        arm(step)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
