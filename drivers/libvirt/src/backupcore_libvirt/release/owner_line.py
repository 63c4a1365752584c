"""The line between the guard and the owner of its run: standard input and output, and the owner's end.

The owner says, a line of JSON each:

- ``{"do": "hold", "watch": [...], "room": [...]}``: from now on something may be held of the guest; look for these
  (`watching.WATCHES`), and at the room beside these disks (`overlay.room.Growing`);
- ``{"do": "keep", "files": [...]}``: hold QEMU's lock on these files until the release; answered by ``kept``, or by
  ``failed``;
- ``{"do": "freeze", "limit": 10}``: the guest is about to be brought to rest; ``{"do": "thawed"}``: it goes on;
- ``{"do": "give up", ...}``, as on the control socket; without a kind the run is only released, and not marked;
- ``{"do": "release"}``: the owner releases now, so nothing is to be done unless the owner dies: see `guard.Guard.turn`;
- ``{"do": "done"}``: all is released.

and hears, as ``{"said": ...}``: ``ready``, or ``failed`` with an error (``kind``, ``message``, ``hint``); ``warning``
with a ``message``; ``admitted`` with the number of a ``process``; ``given up`` with the error; ``released`` with what
the control socket answers; ``yours`` for a release.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from backupcore import process
from backupcore_libvirt.release.loop import Loop

__all__ = ["OwnerLine", "say"]

_LONGEST = 1 << 16


def say(what: dict[str, Any]) -> None:
    """Tell the owner."""
    with suppress(OSError):  # it is gone, or stopped with a full pipe
        os.write(1, json.dumps(what).encode() + b"\n")


class OwnerLine:
    """What is heard of the owner, by its number and its pidfd; `loop` hears it.

    `told` is called with each line, `strays` where what comes is none, `left` when the pipe was closed without a word,
    and `died` when the process has ended.
    """

    def __init__(
        self,
        loop: Loop,
        owner: int,
        handle: int,
        *,
        told: Callable[[dict[str, Any]], None],
        strays: Callable[[], None],
        left: Callable[[], None],
        died: Callable[[], None],
    ) -> None:
        self.lives = True
        """As far as it has been seen."""
        self.open = True
        """Its end of the pipe."""
        self._loop = loop
        self._owner = owner
        self._handle = handle
        self._told = told
        self._strays = strays
        self._left = left
        self._died = died
        self._said = b""
        os.set_blocking(0, False)
        os.set_blocking(1, False)
        loop.on(0, self._hear)
        loop.on(handle, self._hear_death)

    @property
    def works(self) -> bool:
        """Whether it is there, and can still say something."""
        return self.lives and self.open

    @property
    def is_dying(self) -> bool:
        """Whether it was killed and will run no more.

        A system call that cannot be interrupted may keep it: its pidfd does not tell before that returns, and its
        descriptors stay open until then.
        """
        return process.dying(self._owner)

    @property
    def is_stopped(self) -> bool:
        """Whether it was stopped (SIGSTOP), and goes on when somebody has it do so."""
        return process.stopped(self._owner)

    def kill(self) -> None:
        """End it."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def _hear(self) -> None:
        while self.open:
            try:
                piece = os.read(0, _LONGEST)
            except BlockingIOError:
                return
            if not piece:
                self._loop.off(0)
                self.open = False
                self._left()
                return
            self._said += piece
            *lines, self._said = self._said.split(b"\n")
            for line in lines:
                try:
                    self._told(json.loads(line))
                except (ValueError, TypeError, KeyError):  # a descriptor that somebody took for his own
                    self._strays()

    def _hear_death(self) -> None:
        self._loop.off(self._handle)
        self._hear()  # what it said before it ended
        self._died()
