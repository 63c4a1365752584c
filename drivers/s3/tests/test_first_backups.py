"""Several first backups at once below a new prefix, of one VM from two hosts as well: all of them are stored."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from backupcore.context import Context
from backupcore.model import BackupRun, BytesArtifact
from backupcore_s3 import S3
from lab import at_once


def test_at_once(
    driver: S3,
    ctx: Context,
    make_run: Callable[..., BackupRun],
    make_artifacts: Callable[..., list[BytesArtifact]],
    tmp_path: Path,
) -> None:
    vm = str(uuid.uuid4())
    runs = [make_run(vm, host="host-a"), make_run(vm, host="host-b"), make_run(), make_run(host="host-b")]
    given = [make_artifacts(100_000) for _ in runs]
    folders = [tmp_path / f"run{number}" for number in range(len(runs))]
    tokens = at_once.tokens(list(zip([driver] * len(runs), given, runs, folders, strict=True)))
    listed = {one.source.token: one for one in driver.sources(ctx)}
    assert set(listed) == set(tokens)
    for token, artifacts in zip(tokens, given, strict=True):
        disk = next(one for one in driver.restore(listed[token].source, ctx) if one.name == "disk.vda.qcow2")
        with disk.open() as stream:
            assert stream.read() == artifacts[0].data


def test_checks_at_once(driver: S3, ctx: Context, caplog: pytest.LogCaptureFixture) -> None:
    outcomes: list[bool] = []
    threads = [threading.Thread(target=lambda: outcomes.append(driver.check(ctx))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [True] * 4
    assert "conditional writes" not in caplog.text
