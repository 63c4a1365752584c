"""The life of a run without a VM: what the session does, for artifacts that a test has made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from blake3 import blake3

from backupcore import hookimpl
from backupcore.errors import BackupError, Cancelled
from backupcore.model import Artifact, Outcome, Prepared, RunState
from backupcore.testing.target import Target

if TYPE_CHECKING:
    from backupcore.context import Context
    from backupcore.datastore import Datastore
    from backupcore.model import BackupRun, Stored

__all__ = ["DATE", "NoVM", "digest", "keep"]

DATE = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
"""The instant of every run without a VM."""


class NoVM:
    """A hypervisor with nothing to prepare: the artifacts come from a test."""

    @hookimpl
    def prebackup(self) -> Prepared | None:
        """Nothing, at a fixed date."""
        return Prepared(artifacts=(), date=DATE, consistency="off", frozen_seconds=0.0, disks=())


def keep(
    target: Target | Datastore, artifacts: Sequence[Artifact], run: BackupRun, ctx: Context
) -> tuple[Stored, list[BackupError]]:
    """prebackup, backup and postbackup, as the session calls them; what postbackup found wrong comes second."""
    store = target.open(hypervisor=NoVM()) if isinstance(target, Target) else target
    outcome = Outcome(state=RunState.FAILED)
    try:
        run = replace(run, date=store.prebackup(run, ctx).date)
        stored = store.backup(artifacts, run, ctx)
        outcome = Outcome(state=RunState.RECORDED, stored=stored)
    except BackupError as error:
        state = RunState.CANCELLED if isinstance(error, Cancelled) else RunState.FAILED
        outcome = Outcome(state=state, error=error)
        raise
    finally:
        errors = store.postbackup(run, outcome, ctx)
    return stored, errors


def digest(artifact: Artifact) -> tuple[int, str]:
    """How many bytes an artifact's stream gives, and their BLAKE3."""
    hasher, count = blake3(), 0
    with artifact.open() as file:
        while block := file.read(1 << 20):
            hasher.update(block)
            count += len(block)
    return count, hasher.hexdigest()
