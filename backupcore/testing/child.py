"""What the kit does in a process of its own: keep or delete a backup, to be killed meanwhile, and read artifacts."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backupcore.context import Context
from backupcore.testing.life import keep

if TYPE_CHECKING:
    from backupcore.model import Artifact, BackupRun, SourceRef
    from backupcore.testing.target import Target

__all__ = ["main"]


def _keep(target: Target, artifacts: Sequence[Artifact], run: BackupRun, folder: Path) -> SourceRef:
    with Context(folder) as ctx:
        return keep(target, artifacts, run, ctx)[0].source


def _keep_within(target: Target, artifacts: Sequence[Artifact], run: BackupRun, folder: Path, limit: int) -> SourceRef:
    """`_keep`, where no file may become larger than `limit`: a write beyond it fails, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return _keep(target, artifacts, run, folder)


def _keep_and_compare(target: Target, artifacts: Sequence[Artifact], run: BackupRun, folder: Path) -> str:
    """Keep, read back as a stream, and say what is not the same, or ""."""
    source = _keep(target, artifacts, run, folder)
    with Context(folder) as ctx:
        found = target.open().artifacts(source, ctx)
        for given in artifacts:
            if given.name not in found or found[given.name].size != given.size:
                return f"{given.name} does not come back with its {given.size} bytes"
            at = _first_difference(given, found[given.name])
            if at is not None:
                return f"{given.name} of {given.size} bytes comes back with other bytes at {at}"
    return ""


_MIB = 1 << 20
_ENOUGH = 384 << 20  # bytes of a stream that show whether all of it is held in memory
_SAMPLES = 64


def _first_difference(given: Artifact, found: Artifact) -> int | None:
    """About where a stored artifact is not what was given; None if it is the same.

    All of its stream is read, or its begin and, where ranges are cheap, what lies around those that are not zeros, the
    end, and some others: 4 GiB of zeros tell no more than that.
    """
    with found.open() as file:
        at = 0
        while (at < _ENOUGH or not found.seekable) and (block := file.read(_MIB)):
            if block != given.read_at(at, len(block)):
                return at
            at += len(block)
    if not found.seekable or at == given.size:
        return None if at == given.size else at
    step = max(_MIB, given.size // _SAMPLES)
    places: list[int] = [*range(0, given.size, step), *getattr(given, "places", ()), given.size - _MIB]
    for place in sorted(places):
        if found.read_at(place, _MIB) != given.read_at(place, _MIB):
            return place
    return None


_STEPS = (
    *("os.remove", "os.rename", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.mkdir", "shutil.rmtree"),
    *("shutil.move", "socket.connect", "socket.sendto", "socket.sendmsg", "http.client.send", "ftplib.sendcmd"),
    *("subprocess.Popen", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "sqlite3.connect"),
)
"""What a program asks of others, as Python's audit events call it; each is told before it is done."""


def _delete(target: Target, sources: Sequence[SourceRef], folder: Path, at: int) -> int:
    """Delete, and be killed right before the step of this number; 0: how many steps there are."""
    steps = 0
    begun = False

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal steps
        if not begun or not (event in _STEPS or (event == "open" and _to_write(arguments))):
            return
        steps += 1
        if steps == at:
            os.kill(os.getpid(), signal.SIGKILL)

    store = target.open()
    sys.addaudithook(hear)
    with Context(folder) as ctx:
        begun = True
        store.delete(sources, ctx)
        begun = False
    return steps


def _to_write(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2] if len(arguments) > 2 and isinstance(arguments[2], int) else 0
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


def _digests(artifacts: Sequence[Artifact]) -> Mapping[str, tuple[int, str]]:
    from backupcore.testing.life import digest  # noqa: PLC0415 - beside its only use

    return {artifact.name: digest(artifact) for artifact in artifacts}


JOBS: Mapping[str, Callable[..., Any]] = {
    "keep": _keep,
    "keep within": _keep_within,
    "keep and compare": _keep_and_compare,
    "delete": _delete,
    "digests": _digests,
}


def main() -> None:
    """Do the one job that stdin names, and write its pickled result to stdout."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else prints must not get into the answer
    job, arguments = pickle.load(sys.stdin.buffer)  # noqa: S301 - from our own parent, over a pipe
    pickle.dump(JOBS[job](*arguments), output)
    output.close()
