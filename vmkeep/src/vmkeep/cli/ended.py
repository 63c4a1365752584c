"""A driver or site plugin, or a library of theirs, that ends the whole program: told, and never with success.

`os._exit` asks nobody, and whoever has asked for a backup would see exit code 0 and no word. What a child does that was
forked is its own affair.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from vmkeep import ctrl_c
from vmkeep.cli import stdout

__all__ = ["ended_by_others", "ends_with"]


@contextmanager
def ended_by_others(tell: Callable[[str, str], int]) -> Iterator[None]:
    """While the block runs, `tell` is called with a message and a hint before `os._exit` ends
    the process, or makes another program of it (`os.exec…`).

    It returns the exit code, which takes the place of the one that was asked for. `ctrl_c` has the real function.
    """
    own, real = os.getpid(), os._exit
    real_execs = {name: getattr(os, name) for name in ("execv", "execve")}  # all others of the family call these

    def end(status: int, how: str = "") -> NoReturn:
        if os.getpid() == own:
            import traceback  # noqa: PLC0415 - it takes time, and nobody should need it

            caller = next(
                frame
                for frame in reversed(traceback.extract_stack()[: -2 if how else -1])
                if Path(frame.filename).name != "os.py" and frame.filename != "<frozen os>"  # execvp calls execve
            )
            how = how or f"os._exit({status})"
            status = tell(
                f"{caller.name} in {caller.filename}, line {caller.lineno}, has ended vmkeep ({how}) "
                "before the command had come to its end",
                "This is a bug of a driver, a site plugin, or a library of theirs. What is not told above is not done; "
                "what a backup has left is put right by: vmkeep recover",
            )
            stdout.flush()
        real(status)

    def other(name: str) -> Callable[..., Any]:
        exec_ = real_execs[name]

        def replaced(*arguments: Any) -> Any:
            if os.getpid() == own:
                end(0, f"os.{name}({arguments[0]!r:.200})")
            return exec_(*arguments)

        return replaced

    os._exit = end
    for name in real_execs:
        setattr(os, name, other(name))
    try:
        yield
    finally:
        os._exit = real
        for name, exec_ in real_execs.items():
            setattr(os, name, exec_)


def ends_with(code: int) -> None:
    """From now on this process ends with this exit code, whoever ends it, and with what.

    A library may have asked to be called at the end of the program (`atexit`), or left a thread, and end it by
    `os._exit(0)` there: a command that has failed would have gone well.
    """
    own = os.getpid()

    def end(status: int) -> NoReturn:
        if os.getpid() == own:
            stdout.flush()
            status = code
        ctrl_c.end(status)

    os._exit = end
