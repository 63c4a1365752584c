"""A flatten keeps the point of an older snapshot: the two must be told apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from restic_odd import BrokenArtifact

from backupcore.context import Context
from backupcore.errors import BackupError
from backupcore.model import BackupRun, BytesArtifact, new_id
from backupcore_restic import Restic


def test_a_flatten_that_fails_leaves_the_snapshot_whose_point_it_keeps(
    fresh: Restic, ctx: Context, make_run: Callable[..., BackupRun], make_artifacts: Callable[..., list[BytesArtifact]]
) -> None:
    """Found by the point, the clean-up after it would forget the only copy."""
    run = make_run()
    kept = fresh.backup(make_artifacts(), run, ctx).source
    with pytest.raises(BackupError):
        fresh.backup([BrokenArtifact("disk.vda.qcow2", 3 << 20), *make_artifacts()[1:]], replace(run, id=new_id()), ctx)
    assert [one.source for one in fresh.sources(ctx)] == [kept]
