"""A backup goes into the repository and comes back, byte for byte; what is deleted, or is not ours, does not."""

from __future__ import annotations

import json
import pickle
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backupcore.context import Context, Progress
from backupcore.errors import IncrementImpossible, SourceNotFound
from backupcore.model import BackupRun, BytesArtifact, SourceRef
from backupcore_restic import Restic
from backupcore_restic.tags import from_tags, to_tags

Kept = tuple[SourceRef, list[BytesArtifact]]
Runs = Callable[..., BackupRun]
Artifacts = Callable[..., list[BytesArtifact]]


class Heard(Progress):
    """What was said of the progress."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, int | None]] = []
        self.counts: list[int] = []

    def phase(self, name: str, total: int | None = None) -> None:
        self.phases.append((name, total))

    def done(self, count: int) -> None:
        self.counts.append(count)


def restic(driver: Restic, *arguments: str, cwd: Path | None = None) -> bytes:
    environment = {
        "RESTIC_REPOSITORY": driver.repository,
        "RESTIC_PASSWORD_FILE": str(driver.password_file),
        "RESTIC_CACHE_DIR": driver.cache,
        "PATH": "/usr/local/bin:/usr/bin:/bin",
    }
    return subprocess.run(["restic", *arguments], env=environment, cwd=cwd, check=True, capture_output=True).stdout


def test_backup_lists_and_restores_what_it_was_given(
    shared: Restic, ctx: Context, make_run: Runs, make_artifacts: Artifacts, way: str
) -> None:
    run, artifacts = make_run(name="-odd, name"), make_artifacts()
    ctx.progress = heard = Heard()
    shared.prebackup(run, ctx)
    stored = shared.backup(artifacts, run, ctx)
    assert len(stored.source.token) == 64
    assert stored.stored is not None
    assert stored.stored >= 3 << 20
    total = sum(one.size for one in artifacts)
    assert not heard.phases, "the core has told the total"
    assert heard.counts[-1] == total

    listed = {one.source: one for one in shared.sources(ctx)}
    assert listed[stored.source].labels == run.labels

    restored = shared.restore(stored.source, ctx)
    assert [one.name for one in restored] == sorted(one.name for one in artifacts)
    for got, given in zip(restored, sorted(artifacts, key=lambda one: one.name), strict=True):
        assert got.size == given.size
        assert got.seekable == (way == "mount")
        with pickle.loads(pickle.dumps(got)).open() as stream:
            assert stream.read() == given.data

    # An increment on top of it may be taken; on top of something that is gone, not.
    shared.prebackup(make_run(builds_on=(stored.source,)), ctx)
    with pytest.raises(IncrementImpossible, match="ffffffff"):
        shared.prebackup(make_run(builds_on=(stored.source, SourceRef("f" * 64))), ctx)


def test_the_snapshot_says_what_it_is_to_those_who_use_restic_itself(shared: Restic, kept: Kept) -> None:
    source, _ = kept
    listed = restic(shared, "ls", "-l", source.token).decode()
    assert "/disk.vda.qcow2\n" in listed
    assert restic(shared, "snapshots", "--host=web", "--tag=backupcore,type=FULL", source.token)


@pytest.mark.usefixtures("unmountable")
def test_a_stream_closed_early_leaves_no_restic(shared: Restic, kept: Kept, ctx: Context, running: Callable) -> None:
    source, artifacts = kept
    disk = next(one for one in shared.restore(source, ctx) if one.name == "disk.vda.qcow2")
    stream = disk.open()
    assert stream.read(1000) == artifacts[0].data[:1000]
    assert running(shared.repository)
    stream.close()
    stream.close()
    assert not running(shared.repository)
    second = disk.open()
    assert running(shared.repository)
    ctx.stack.close()  # as at the end of a restore: nobody closed the second one
    assert not running(shared.repository)
    with pytest.raises(ValueError, match="closed"):
        second.read(1)


@pytest.mark.usefixtures("way")
def test_a_stream_outlives_the_thread_that_opened_it(shared: Restic, kept: Kept, ctx: Context) -> None:
    # The kernel's death signal goes by the thread that forked, not by the process.
    disk = next(one for one in shared.restore(kept[0], ctx) if one.name == "disk.vda.qcow2")
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(disk.open).result()
    with stream:
        assert stream.read() == kept[1][0].data


@pytest.mark.parametrize(
    "token", ["latest", "0" * 64, "a", "F" * 64, "latest=..", "0" * 63, "f" * 65], ids=lambda token: token[:9]
)
def test_a_token_is_never_interpreted(shared: Restic, kept: Kept, ctx: Context, token: str) -> None:
    with pytest.raises(SourceNotFound):
        shared.restore(SourceRef(token), ctx)


def test_a_prefix_of_a_source_is_not_that_source(shared: Restic, kept: Kept, ctx: Context) -> None:
    short = SourceRef(kept[0].token[:12])
    with pytest.raises(SourceNotFound):
        shared.restore(short, ctx)
    assert shared.delete([short, SourceRef("latest")], ctx)
    assert shared.restore(kept[0], ctx)


@pytest.mark.usefixtures("way")
def test_deleted_is_gone_and_deleting_again_is_fine(
    fresh: Restic, ctx: Context, make_run: Runs, make_artifacts: Artifacts
) -> None:
    first, second = (fresh.backup(make_artifacts(1000), make_run(), ctx).source for _ in range(2))
    assert fresh.restore(first, ctx)
    assert fresh.delete([first, SourceRef("0" * 64)], ctx)
    with pytest.raises(SourceNotFound):
        fresh.restore(first, ctx)
    assert [one.source for one in fresh.sources(ctx)] == [second]
    assert fresh.delete([first], ctx)
    assert fresh.delete([], ctx)


def test_what_is_not_ours_or_not_complete_is_not_listed(fresh: Restic, ctx: Context, tmp_path: Path) -> None:
    assert list(fresh.sources(ctx)) == []
    folder = tmp_path / "files"
    (folder / "deeper").mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    restic(fresh, "backup", ".", cwd=folder)  # somebody's files
    (folder / "manifest.json").rename(folder / "deeper" / "manifest.json")
    restic(fresh, "backup", "--tag=backupcore", "--tag=point=1", ".", cwd=folder)  # ours, but torn
    assert list(fresh.sources(ctx)) == []
    [torn] = [one["id"] for one in json.loads(restic(fresh, "snapshots", "--json", "--tag=backupcore"))]
    with pytest.raises(SourceNotFound):
        fresh.restore(SourceRef(torn), ctx)


def test_labels_survive_as_tags() -> None:
    labels = {"vm": "a-b", "parent": "", "date": "2026-01-02T03:04:05Z", "odd": "a,b=c%20 d"}
    tags = to_tags(labels)
    assert not any("," in tag for tag in tags)
    assert "date=2026-01-02T03:04:05Z" in tags
    assert from_tags([*tags, "a tag of the user's"]) == labels


def test_usage_of_a_local_repository(shared: Restic, kept: Kept, ctx: Context) -> None:
    usage = shared.usage(ctx)
    assert usage.used
    assert usage.used > 3 << 20
    assert usage.total
    assert usage.free
    assert usage.free < usage.total
    assert shared.check(ctx) is True
