"""A driver or site plugin, or a library of theirs, that ends the whole program: told, and never with success.

`os._exit` asks nobody, and whoever has asked for a backup would see exit code 0 and no word. What a child does that was
forked is its own affair.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

__all__ = ["ended_by_others"]


@contextmanager
def ended_by_others(tell: Callable[[str, str], int]) -> Iterator[None]:
    """While the block runs, `tell` is called with a message and a hint before the process is ended by `os._exit`.

    It returns the exit code, which takes the place of the one that was asked for. `ctrl_c` has the real function.
    """
    own, real = os.getpid(), os._exit

    def end(status: int) -> NoReturn:
        if os.getpid() == own:
            import traceback  # noqa: PLC0415 - it takes time, and nobody should need it

            caller = traceback.extract_stack(limit=2)[0]
            status = tell(
                f"{caller.name} in {caller.filename}, line {caller.lineno}, has ended vmkeep (os._exit({status})) "
                "before the command had come to its end",
                "This is a bug of a driver, a site plugin, or a library of theirs. What is not told above is not done; "
                "what a backup has left is put right by: vmkeep recover",
            )
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
        real(status)

    os._exit = end
    try:
        yield
    finally:
        os._exit = real
