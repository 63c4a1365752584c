"""Faults at named steps, for tests of host tooling: an error, a hang, or the death of the process.

::

    faults = Faults({"backup after": fails(TargetFull("no room left"))})
    store = Datastore("nas", MemoryDriver(), hypervisor=hypervisor, plugins=[faults])

`Faults` is a site plugin like any other, so it works around every driver and every hypervisor; in a configuration it
stands as ``plugins = ["my_tests:faults"]`` under ``[host]``. The steps are ``"<hook> before"`` and ``"<hook> after"``
for every hook that the driver has, where "after" means that its work is done and nobody has been told yet, and
``"restore read"``, which is passed whenever a restored artifact is read. (postbackup is called for each plugin by
itself, so its steps may be passed twice in a run.)
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, BinaryIO

from backupcore import hookimpl
from backupcore.context import Context
from backupcore.errors import BackupError
from backupcore.model import Artifact

__all__ = ["STEPS", "Fault", "Faults", "fails", "hangs", "kills"]

Fault = Callable[[Context], None]
"""What happens at a step. It returns where nothing is to happen this time."""

HOOKS = ("prebackup", "backup", "postbackup", "restore", "flatten", "delete", "sources", "check", "usage")
STEPS = (*(f"{hook} {when}" for hook in HOOKS for when in ("before", "after")), "restore read")


def fails(error: BackupError | OSError) -> Fault:
    """Raise this error, as the hook itself would."""

    def fault(ctx: Context) -> None:
        raise error

    return fault


def hangs() -> Fault:
    """Go on only when the user stops the run, like a server that does not answer."""

    def fault(ctx: Context) -> None:
        while True:
            ctx.wait(60)

    return fault


def kills() -> Fault:
    """kill -9 of this process."""

    def fault(ctx: Context) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    return fault


class Faults:
    """Does what `at` says at each step. `seen` is every step that was passed, in order."""

    def __init__(self, at: Mapping[str, Fault]) -> None:
        unknown = sorted(set(at) - set(STEPS))
        if unknown:
            raise ValueError(f"there is no step {', '.join(unknown)}; the steps are: {', '.join(STEPS)}")
        self.at = dict(at)
        self.seen: list[str] = []

    def _pass(self, step: str, ctx: Context) -> None:
        self.seen.append(step)
        if fault := self.at.get(step):
            fault(ctx)

    def _around(self, hook: str, ctx: Context) -> Generator[None, Any, Any]:
        self._pass(f"{hook} before", ctx)
        answer = yield
        self._pass(f"{hook} after", ctx)
        return answer

    @hookimpl(wrapper=True)
    def prebackup(self, ctx: Context) -> Generator[None, Any, Any]:
        """The steps around it, as for all hooks."""
        return (yield from self._around("prebackup", ctx))

    @hookimpl(wrapper=True)
    def backup(self, ctx: Context) -> Generator[None, Any, Any]:
        """As above."""
        return (yield from self._around("backup", ctx))

    @hookimpl(wrapper=True)
    def postbackup(self, ctx: Context) -> Generator[None, Any, Any]:
        """As above."""
        return (yield from self._around("postbackup", ctx))

    @hookimpl(wrapper=True)
    def restore(self, ctx: Context) -> Generator[None, Any, Sequence[Artifact]]:
        """As above; the artifacts pass ``restore read`` when they are read."""
        found = yield from self._around("restore", ctx)
        return [_Read(artifact, self, ctx) for artifact in found]

    @hookimpl(wrapper=True)
    def flatten(self, ctx: Context) -> Generator[None, Any, Any]:
        """As above."""
        return (yield from self._around("flatten", ctx))

    @hookimpl(wrapper=True)
    def delete(self, ctx: Context) -> Generator[None, Any, Any]:
        """As above."""
        return (yield from self._around("delete", ctx))

    @hookimpl(wrapper=True)
    def sources(self, ctx: Context) -> Generator[None, Any, Any]:
        """As above."""
        return (yield from self._around("sources", ctx))

    @hookimpl(wrapper=True)
    def check(self, ctx: Context) -> Generator[None, Any, Any]:
        """As above."""
        return (yield from self._around("check", ctx))

    @hookimpl(wrapper=True)
    def usage(self, ctx: Context) -> Generator[None, Any, Any]:
        """As above."""
        return (yield from self._around("usage", ctx))


class _Read(Artifact):
    def __init__(self, inner: Artifact, faults: Faults, ctx: Context) -> None:
        self._inner = inner
        self._faults = faults
        self._ctx = ctx
        self.name = inner.name
        self.size = inner.size
        self.seekable = inner.seekable

    def open(self) -> BinaryIO:
        self._faults._pass("restore read", self._ctx)
        return self._inner.open()

    def read_at(self, offset: int, length: int) -> bytes:
        self._faults._pass("restore read", self._ctx)
        return self._inner.read_at(offset, length)

    def __reduce__(self) -> tuple[Callable[[Artifact], Artifact], tuple[Artifact]]:
        return _plain, (self._inner,)


def _plain(artifact: Artifact) -> Artifact:
    """What is left of an artifact in another process: there is no context there."""
    return artifact
