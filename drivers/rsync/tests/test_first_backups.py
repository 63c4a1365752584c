"""Several first backups at once into an empty target, of one VM from two hosts as well: all of them are stored."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path

from backupcore.context import Context
from backupcore.model import SourceRef
from drivers.rsync.tests.kinds import Kind, new_artifacts, new_run
from lab import at_once


def test_at_once(kind: Kind, ctx: Context, tmp_path: Path) -> None:
    vm = str(uuid.uuid4())
    made = [new_run(vm, "host-a"), new_run(vm, "host-b"), new_run(host="host-a"), new_run(host="host-b")]
    runs = [replace(run, settings={}) for run in made]
    given = [new_artifacts(100_000 + number) for number in range(len(runs))]
    folders = [tmp_path / f"run{number}" for number in range(len(runs))]
    tokens = at_once.tokens(list(zip([kind.driver()] * len(runs), given, runs, folders, strict=True)))
    assert {one.source.token: one.labels for one in kind.driver().sources(ctx)} == {
        token: run.labels for token, run in zip(tokens, runs, strict=True)
    }
    for token, artifacts in zip(tokens, given, strict=True):
        assert kind.kept(SourceRef(token)).joinpath("disk.vda.qcow2").stat().st_size == artifacts[0].size
    assert not [path for path in kind.everything() if path.endswith(".part")]
