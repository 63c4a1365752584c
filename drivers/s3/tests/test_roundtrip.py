"""A backup goes into the bucket and comes back, byte for byte; what is deleted, or is not ours, does not."""

from __future__ import annotations

import io
import os
import pickle
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from backupcore.context import Context, Progress
from backupcore.errors import ContractViolation, IncrementImpossible, SourceNotFound
from backupcore.model import Artifact, BackupRun, BytesArtifact, SourceRef, stream
from backupcore_s3 import S3

Options = Callable[..., S3]
Runs = Callable[..., BackupRun]
Artifacts = Callable[..., list[BytesArtifact]]
Keys = Callable[..., list[str]]


class Heard(Progress):
    """What was said of the progress."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def phase(self, name: str, total: int | None = None) -> None:
        raise AssertionError("the core has told the total")

    def done(self, count: int) -> None:
        self.counts.append(count)


class InOrder(Artifact):
    """Refuses to be read before all of `before` were read to their ends, and counts what is read of it."""

    def __init__(self, inner: Artifact, *before: InOrder) -> None:
        self.name, self.size = inner.name, inner.size
        self.count = 0
        self._inner = inner
        self._before = before
        self._lock = threading.Lock()

    def open(self) -> io.BufferedReader:
        return stream(self)

    def read_at(self, offset: int, length: int) -> bytes:
        for one in self._before:
            assert one.count >= one.size, f"{self.name} was read before {one.name}"
        data = self._inner.read_at(offset, length)
        with self._lock:
            self.count += len(data)
        return data


def test_backup_lists_and_restores_what_it_was_given(
    driver: S3, ctx: Context, make_run: Runs, make_artifacts: Artifacts, client: Any, bucket: str, keys: Keys
) -> None:
    run, artifacts = make_run(), make_artifacts(18 << 20)
    ctx.progress = heard = Heard()
    driver.prebackup(run, ctx)
    stored = driver.backup(artifacts, run, ctx)
    vm, _, folder = stored.source.token.partition(".")
    assert vm == run.vm.uuid
    assert keys(client, bucket) == [f"backups/{vm}/{folder}/{one.name}" for one in artifacts]
    total = sum(one.size for one in artifacts)
    assert stored.stored == total
    assert sorted(heard.counts) == heard.counts
    assert heard.counts[-1] == total

    [listed] = driver.sources(ctx)
    assert (listed.source, listed.labels, listed.size) == (stored.source, run.labels, total)

    restored = driver.restore(stored.source, ctx)
    assert [one.name for one in restored] == [one.name for one in artifacts]
    for got, given in zip(restored, artifacts, strict=True):
        assert got.size == given.size
        with pickle.loads(pickle.dumps(got)).open() as file:
            assert file.read() == given.data
    # An increment on top of it may be taken; on top of something that is gone, not.
    driver.prebackup(make_run(vm, builds_on=(stored.source,)), ctx)
    for gone in (f"{vm}.{'f' * 32}", "latest"):
        with pytest.raises(IncrementImpossible, match="no longer in bucket"):
            driver.prebackup(make_run(vm, builds_on=(stored.source, SourceRef(gone))), ctx)


def test_ranges_from_any_threads(driver: S3, ctx: Context, make_run: Runs, make_artifacts: Artifacts) -> None:
    artifacts = make_artifacts(20 << 20)
    disk = next(
        one
        for one in driver.restore(driver.backup(artifacts, make_run(), ctx).source, ctx)
        if one.name == "disk.vda.qcow2"
    )
    data = artifacts[0].data
    assert disk.seekable
    assert disk.read_at(disk.size - 3, 10) == data[-3:]
    assert disk.read_at(disk.size, 10) == disk.read_at(disk.size + 9, 10) == disk.read_at(5, 0) == b""
    places = [(random.randrange(disk.size), random.randrange(1 << 20)) for _ in range(40)]
    with ThreadPoolExecutor(8) as pool:
        for (offset, length), found in zip(places, pool.map(lambda one: disk.read_at(*one), places), strict=True):
            assert found == data[offset : offset + length]

    # Two sequential readers, one closed early; its threads end.
    with disk.open() as first, disk.open() as second:
        assert first.read(1000) == data[:1000]
        assert second.read(9 << 20) == data[: 9 << 20]
        first.close()
        assert second.read() == data[9 << 20 :]
    left_open = disk.open()
    assert left_open.read(1) == data[:1]
    ctx.stack.close()
    with pytest.raises(ValueError, match="closed"):
        left_open.read()


def test_disks_are_read_once_and_before_what_waits_for_them(driver: S3, ctx: Context, make_run: Runs) -> None:
    # A parted disk and a small one; 'sums' and the manifest sort before and between them.
    disks = [
        InOrder(BytesArtifact(f"disk.{name}.qcow2", os.urandom(size))) for name, size in (("vda", 18 << 20), ("vdb", 9))
    ]
    sums = [InOrder(BytesArtifact(f"sums.{name}", bytes(32)), *disks) for name in ("vda", "vdb")]
    manifest = InOrder(BytesArtifact("manifest.json", b"{}"), *disks, *sums)
    artifacts = sorted([*disks, *sums, manifest], key=lambda one: one.name)
    driver.backup(artifacts, make_run(), ctx)
    assert [one.count for one in artifacts] == [one.size for one in artifacts]


@pytest.mark.parametrize("size", [0, 1, (8 << 20) - 1, 8 << 20, (8 << 20) + 1, 16 << 20])
def test_sizes_around_a_part(
    options: Options, bucket: str, ctx: Context, make_run: Runs, make_artifacts: Artifacts, size: int
) -> None:
    driver = options(bucket, concurrency=16)
    artifacts = make_artifacts(size)
    source = driver.backup(artifacts, make_run(), ctx).source
    disk = next(one for one in driver.restore(source, ctx) if one.name == "disk.vda.qcow2")
    with disk.open() as file:
        assert file.read() == artifacts[0].data


@pytest.mark.parametrize("lie", [-1, 1, 20 << 20])
def test_a_giver_that_lies_about_its_size_leaves_nothing(
    driver: S3, ctx: Context, make_run: Runs, make_artifacts: Artifacts, client: Any, bucket: str, keys: Keys, lie: int
) -> None:
    disk, *rest = make_artifacts(1000)
    wrong = InOrder(disk)
    wrong.size += lie
    with pytest.raises(ContractViolation, match="disk.vda"):
        driver.backup([wrong, *rest], make_run(), ctx)
    assert keys(client, bucket) == []
    assert not client.list_multipart_uploads(Bucket=bucket).get("Uploads")


@pytest.mark.parametrize(
    "token",
    [
        "latest",
        "a",
        "0" * 65,
        "00000000-0000-0000-0000-000000000000." + "f" * 32,
        "..".join("ab"),
        "A" * 36 + "." + "0" * 32,
    ],
)
def test_a_token_is_never_interpreted(driver: S3, ctx: Context, token: str) -> None:
    with pytest.raises(SourceNotFound):
        driver.restore(SourceRef(token), ctx)
    assert driver.delete([SourceRef(token)], ctx)


def test_a_prefix_of_a_source_is_not_that_source(
    driver: S3, ctx: Context, make_run: Runs, make_artifacts: Artifacts
) -> None:
    source = driver.backup(make_artifacts(10), make_run(), ctx).source
    for token in (source.token[:-1], source.token.partition(".")[0], source.token.replace(".", "-")):
        assert driver.delete([SourceRef(token)], ctx)
        with pytest.raises(SourceNotFound):
            driver.restore(SourceRef(token), ctx)
    assert driver.restore(source, ctx)


def test_deleted_is_gone_and_deleting_again_is_fine(
    driver: S3, ctx: Context, make_run: Runs, make_artifacts: Artifacts, client: Any, bucket: str, keys: Keys
) -> None:
    run = make_run()
    first, second, third = (driver.backup(make_artifacts(1000), run, ctx).source for _ in range(3))
    assert driver.delete([first, SourceRef(f"{run.vm.uuid}.{'0' * 32}"), third], ctx)
    for gone in (first, third):
        with pytest.raises(SourceNotFound):
            driver.restore(gone, ctx)
        assert not any(gone.token.partition(".")[2] in key for key in keys(client, bucket))
    assert [one.source for one in driver.sources(ctx)] == [second]
    assert driver.delete([first, third], ctx)
    assert driver.delete([], ctx)
    assert len(driver.restore(second, ctx)) == 5


def test_what_is_not_ours_or_not_complete_is_not_listed(
    driver: S3, ctx: Context, make_run: Runs, make_artifacts: Artifacts, client: Any, bucket: str
) -> None:
    assert list(driver.sources(ctx)) == []
    run = make_run()
    torn, whole = (driver.backup(make_artifacts(1000), run, ctx).source for _ in range(2))
    client.delete_object(Bucket=bucket, Key=f"backups/{torn.token.replace('.', '/')}/manifest.json")
    folder = f"backups/{whole.token.replace('.', '/')}"
    others = ("manifest.json", f"backups/{run.vm.uuid}/manifest.json", f"backups/x/{'0' * 32}/manifest.json")
    for key in (*others, f"{folder}/deeper/manifest.json", f"other/{run.vm.uuid}/{'1' * 32}/manifest.json"):
        client.put_object(Bucket=bucket, Key=key, Body=b"{}")
    assert [one.source for one in driver.sources(ctx)] == [whole]
    with pytest.raises(SourceNotFound):
        driver.restore(torn, ctx)
    assert [one.name for one in driver.restore(whole, ctx)] == [one.name for one in make_artifacts(1)]


@pytest.mark.parametrize("installation", ["", "e" * 32])
def test_labels_survive_a_copy_without_metadata(
    driver: S3, ctx: Context, make_run: Runs, make_artifacts: Artifacts, client: Any, bucket: str, installation: str
) -> None:
    run = replace(make_run(), installation=installation)
    whose = f'"installation": "{installation}", ' if installation else ""
    source = driver.backup(make_artifacts(10), run, ctx).source
    labels = run.labels
    manifest = (
        f'{{{whose}"vm": {{"uuid": "{labels["vm"]}"}}, "image": "{labels["image"]}", "number": 0,'
        f' "point": "{labels["point"]}", "parent": null, "type": "FULL", "date": "2026-01-02T03:04:05.000+00:00"}}'
    ).encode()
    key = f"backups/{source.token.replace('.', '/')}/manifest.json"
    client.put_object(Bucket=bucket, Key=key, Body=manifest)
    assert [one.labels for one in driver.sources(ctx)] == [labels]
    client.put_object(Bucket=bucket, Key=key, Body=b"torn")
    assert [one.labels for one in driver.sources(ctx)] == [{}]


@pytest.mark.parametrize("prefix", ["", "a/b/", "/odd ü+%&=#?'\"(1)/@:~", "x" * 400])
def test_odd_prefixes(
    options: Options, ctx: Context, make_run: Runs, make_artifacts: Artifacts, bucket: str, prefix: str
) -> None:
    driver, other = options(bucket, prefix=prefix), options(bucket, prefix=f"{prefix}2")
    run, artifacts = make_run(), make_artifacts(17 << 20)
    driver.prebackup(run, ctx)
    source = driver.backup(artifacts, run, ctx).source
    assert driver.check(ctx)
    assert [one.labels for one in driver.sources(ctx)] == [run.labels]
    assert next(iter(driver.restore(source, ctx))).read_at(5, 10) == artifacts[0].data[5:15]
    assert list(other.sources(ctx)) == []
    assert other.delete([source], ctx)
    assert driver.usage(ctx).used == sum(one.size for one in artifacts)
    assert driver.delete([source], ctx)
    assert driver.usage(ctx).used == 0


def test_two_hosts_and_several_runs_at_once(
    options: Options, bucket: str, ctx: Context, make_run: Runs, make_artifacts: Artifacts
) -> None:
    driver = options(bucket, concurrency=16)
    vm = make_run().vm.uuid
    runs = [replace(make_run(vm), host=f"host-{number % 2}") for number in range(4)]

    def back_up(run: BackupRun) -> tuple[SourceRef, bytes]:
        artifacts = make_artifacts(9 << 20)
        driver.prebackup(run, ctx)
        return driver.backup(artifacts, run, ctx).source, artifacts[0].data

    with ThreadPoolExecutor(4) as pool:
        kept = list(pool.map(back_up, runs))
    assert {one.source for one in driver.sources(ctx)} == {source for source, _ in kept}
    for source, data in kept:
        disk = next(one for one in driver.restore(source, ctx) if one.name == "disk.vda.qcow2")
        with disk.open() as file:
            assert file.read() == data


def test_more_sources_than_one_page_of_a_listing(
    options: Options, ctx: Context, make_run: Runs, make_artifacts: Artifacts, client: Any, bucket: str
) -> None:
    driver = options(bucket)
    run = make_run()
    source = driver.backup(make_artifacts(10), run, ctx).source
    key = f"backups/{source.token.replace('.', '/')}/manifest.json"
    labels = client.head_object(Bucket=bucket, Key=key)["Metadata"]

    def copy(number: int) -> None:
        place = f"backups/{run.vm.uuid}/{number:032x}"
        client.put_object(Bucket=bucket, Key=f"{place}/manifest.json", Body=b"{}", Metadata=labels)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(copy, range(1, 1001)))
    listed = list(driver.sources(ctx))
    assert len(listed) == 1001
    assert all(one.labels == run.labels for one in listed)
