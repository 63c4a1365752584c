"""What the kit does in a process of its own: keep a backup, to be killed meanwhile, and read pickled artifacts."""

from __future__ import annotations

import os
import pickle
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


def _digests(artifacts: Sequence[Artifact]) -> Mapping[str, tuple[int, str]]:
    from backupcore.testing.life import digest  # noqa: PLC0415 - beside its only use

    return {artifact.name: digest(artifact) for artifact in artifacts}


JOBS: Mapping[str, Callable[..., Any]] = {"keep": _keep, "digests": _digests}


def main() -> None:
    """Do the one job that stdin names, and write its pickled result to stdout."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else prints must not get into the answer
    job, arguments = pickle.load(sys.stdin.buffer)  # noqa: S301 - from our own parent, over a pipe
    pickle.dump(JOBS[job](*arguments), output)
    output.close()
