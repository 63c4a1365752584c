"""`maintain` gives back the room of what was deleted, and notices damage; what is kept stays restorable."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from backupcore.context import Context
from backupcore.errors import ConfigError, IntegrityError
from backupcore.model import BackupRun, BytesArtifact
from backupcore_restic import Restic

Runs = Callable[..., BackupRun]
Artifacts = Callable[..., list[BytesArtifact]]


def data(repository: str) -> list[Path]:
    return [path for path in Path(repository, "data").rglob("*") if path.is_file()]


def test_room_comes_back_and_damage_is_noticed(
    options: Callable[..., Restic], fresh: Restic, ctx: Context, make_run: Runs, make_artifacts: Artifacts
) -> None:
    first = fresh.backup(make_artifacts(8 << 20), make_run(), ctx).source
    second = fresh.backup(given := make_artifacts(1 << 20), make_run(), ctx).source
    full = fresh.usage(ctx).used or 0
    fresh.delete([first], ctx)
    assert (fresh.usage(ctx).used or 0) > full - (1 << 20), "deleting does not prune"
    driver = options(fresh.repository, max_unused="0", check_data="100%")
    phases: list[str] = []

    class Heard:
        def phase(self, name: str, total: int | None = None) -> None:
            phases.append(name)

        def done(self, count: int) -> None:
            """Nothing to count."""

    ctx.progress = Heard()
    assert driver.maintain(ctx) is True
    assert phases == ["pruning", "checking"]
    assert (driver.usage(ctx).used or 0) < full - (7 << 20)
    disk = next(one for one in driver.restore(second, ctx) if one.name == "disk.vda.qcow2")
    with disk.open() as stream:
        assert stream.read() == given[0].data

    biggest = max(data(fresh.repository), key=lambda path: path.stat().st_size)
    biggest.chmod(0o600)
    with biggest.open("r+b") as pack:
        pack.seek(biggest.stat().st_size // 2)
        pack.write(os.urandom(16))
    with pytest.raises(IntegrityError, match="checking") as caught:
        driver.maintain(ctx)
    assert "restic check --read-data" in caught.value.hint


def test_a_limit_that_restic_does_not_take(options: Callable[..., Restic], fresh: Restic, ctx: Context) -> None:
    with pytest.raises(ConfigError, match="pruning"):
        options(fresh.repository, max_unused="much").maintain(ctx)
