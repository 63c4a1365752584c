"""A backup goes into a target of each kind and comes back; what is deleted, or is not ours, does not."""

from __future__ import annotations

import os
import pickle
import stat
from pathlib import Path

import pytest

from backupcore.context import Context, Progress
from backupcore.errors import IncrementImpossible, IntegrityError, SourceNotFound, TargetUnavailable
from backupcore.model import SourceRef
from backupcore_rsync import Rsync
from drivers.rsync.tests.kinds import Kind, new_artifacts, new_run


class Heard(Progress):
    """What was said of the progress."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def phase(self, name: str, total: int | None = None) -> None:
        raise AssertionError("the core has told the total")

    def done(self, count: int) -> None:
        self.counts.append(count)


def keep(driver: Rsync, ctx: Context, size: int = 1000, vm: str = "") -> SourceRef:
    run = new_run(vm)
    driver.prebackup(run, ctx)
    return driver.backup(new_artifacts(size), run, ctx).source


def test_a_backup_is_a_folder_of_plain_files(kind: Kind, ctx: Context) -> None:
    run, artifacts = new_run(), new_artifacts()
    driver = kind.driver()
    ctx.progress = heard = Heard()
    driver.prebackup(run, ctx)
    stored = driver.backup(artifacts, run, ctx)
    total = sum(one.size for one in artifacts)
    assert stored.stored == total
    assert heard.counts
    assert max(heard.counts) == total

    folder = kind.kept(stored.source)
    assert folder.parent == kind.root / run.vm.uuid
    for artifact in artifacts:
        path = folder / artifact.name
        assert path.read_bytes() == artifact.open().read()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name for path in folder.iterdir() if path.name[0] != "."} == {one.name for one in artifacts}

    # ... and comes back, also to a driver that has nothing but the same options.
    [listed] = kind.driver().sources(ctx)
    assert listed.source == stored.source
    assert listed.labels == run.labels
    assert listed.size == total
    restored = kind.driver().restore(stored.source, ctx)
    assert [one.name for one in restored] == sorted(one.name for one in artifacts)
    for got, given in zip(restored, sorted(artifacts, key=lambda one: one.name), strict=True):
        assert got.size == given.size
        with pickle.loads(pickle.dumps(got)).open() as stream:
            assert stream.read() == given.open().read()
        if got.seekable:
            assert got.read_at(1000, 10) == given.read_at(1000, 10)
    assert not list(ctx.folder.glob("rsync-*/disk*")), "what is fetched is gone once it is read"

    # An increment on top of it may be taken; on top of something that is gone, not.
    driver.prebackup(new_run(run.vm.uuid, builds_on=(stored.source,)), ctx)
    for gone in (f"{run.vm.uuid}.{'f' * 32}", "f" * 64, "latest"):
        with pytest.raises(IncrementImpossible, match=gone[-32:]):
            driver.prebackup(new_run(run.vm.uuid, builds_on=(stored.source, SourceRef(gone))), ctx)

    usage = driver.usage(ctx)
    assert usage.used == total
    if kind.name == "daemon":
        assert usage.total is None
    else:
        room = os.statvfs(kind.root)
        assert usage.total == room.f_blocks * room.f_frsize
        assert usage.free
        assert usage.free < usage.total
    assert driver.check(ctx)


def test_what_is_not_complete_or_not_ours_is_neither_listed_nor_touched(kind: Kind, ctx: Context) -> None:
    driver = kind.driver()
    source = keep(driver, ctx)
    vm = kind.root / source.token[:36]
    torn, link, beside = vm / ("a" * 32), vm / ("b" * 32), kind.root / "photos" / ("c" * 32)
    beside.mkdir(parents=True)
    torn.mkdir()
    link.symlink_to(kind.kept(source))
    (kind.root / "0e9a2a1b-0000-4000-8000-000000000000").symlink_to(vm)
    (torn / "disk.vda.qcow2").touch()
    for folder in (beside, kind.root, vm, vm / "notes"):
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_text("{}")
    before = kind.everything()
    assert [one.source for one in driver.sources(ctx)] == [source]
    for name in (f"{source.token[:36]}.{'a' * 32}", f"{source.token[:36]}.{'b' * 32}"):
        with pytest.raises(SourceNotFound):
            driver.restore(SourceRef(name), ctx)
    by_link = SourceRef(f"0e9a2a1b-0000-4000-8000-000000000000.{source.token[37:]}")
    with pytest.raises(SourceNotFound):
        driver.restore(by_link, ctx)
    assert driver.delete([by_link, SourceRef(f"{source.token[:36]}.{'b' * 32}")], ctx)
    driver.prebackup(new_run(source.token[:36]), ctx)
    if kind.name == "daemon":  # which takes the link away, and not what it leads to
        link.symlink_to(kind.kept(source))
    assert kind.everything() == before


@pytest.mark.parametrize("token", ["a..", "photos", "0" * 69, f"{'0' * 36}.{'0' * 32}", "notes=.."])
def test_a_token_is_never_a_path(kind: Kind, ctx: Context, token: str) -> None:
    (kind.root.parent / "a..").mkdir(exist_ok=True)
    (kind.root / "photos").mkdir()
    (kind.root / "photos" / "manifest.json").touch()
    with pytest.raises(SourceNotFound):
        kind.driver().restore(SourceRef(token), ctx)
    assert kind.driver().delete([SourceRef(token)], ctx)
    assert kind.everything() == ["photos/manifest.json"]


def test_deleted_is_gone_and_the_others_stay(kind: Kind, ctx: Context) -> None:
    driver = kind.driver()
    first = keep(driver, ctx)
    second, third = keep(driver, ctx, vm=first.token[:36]), keep(driver, ctx)
    (kind.kept(first).parent / "notes.txt").write_text("mine")
    (kind.root / "photos").mkdir()
    (kind.root / "photos" / "cat").touch()
    absent = SourceRef(f"{first.token[:36]}.{'0' * 32}")
    nowhere = SourceRef(f"0e9a2a1b-0000-4000-8000-000000000000.{'0' * 32}")
    assert driver.delete([first, absent, nowhere, third], ctx)
    assert [one.source for one in driver.sources(ctx)] == [second]
    assert not kind.kept(first).exists()
    assert not kind.kept(absent).exists()
    assert not kind.kept(nowhere).parent.exists()
    assert (kind.kept(first).parent / "notes.txt").read_text() == "mine"
    assert kind.kept(third).parent.exists() == (kind.name == "daemon")
    assert (kind.root / "photos" / "cat").exists()
    with pytest.raises(SourceNotFound):
        driver.restore(first, ctx)
    assert driver.restore(second, ctx)
    assert driver.delete([first], ctx)
    assert driver.delete([], ctx)


def test_a_disk_that_is_not_mounted_does_not_hide_that_all_is_gone(kind: Kind, ctx: Context) -> None:
    gone = SourceRef(f"0e9a2a1b-0000-4000-8000-000000000000.{'0' * 32}")
    with pytest.raises(TargetUnavailable, match="no backups at all") as caught:
        kind.driver().prebackup(new_run(builds_on=(gone,)), ctx)
    assert "mounted" in caught.value.hint


@pytest.mark.parametrize("kind", ["folder", "daemon", pytest.param("host", marks=pytest.mark.soak)], indirect=True)
def test_a_thousand_sources_are_one_listing(kind: Kind, ctx: Context) -> None:
    driver = kind.driver()
    source = keep(driver, ctx)
    model = kind.kept(source)
    names = sorted(str(path.relative_to(model)) for path in model.rglob("*"))
    expected = {source.token}
    for number in range(1, 1000):
        folder = kind.root / f"{number % 20:08x}-0000-4000-8000-000000000000" / f"{number:032x}"
        expected.add(str(folder.relative_to(kind.root)).replace("/", "."))
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).mkdir() if name == ".labels" else (folder / name).touch()
    found = list(driver.sources(ctx))
    assert {one.source.token for one in found} == expected
    assert all(one.labels == found[0].labels for one in found)


def test_a_link_in_the_place_of_a_file_is_not_followed(tmp_path: Path, ctx: Context) -> None:
    kind = Kind("folder", tmp_path / "target", {"target": str(tmp_path / "target")})
    kind.root.mkdir()
    source = keep(kind.driver(), ctx)
    disk = next(one for one in kind.driver().restore(source, ctx) if one.name == "disk.vda.qcow2")
    file = kind.kept(source) / "disk.vda.qcow2"
    file.unlink()
    file.symlink_to("/etc/passwd")
    with pytest.raises(TargetUnavailable):
        disk.open()
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(IntegrityError, match="no plain file"):
        disk.read_at(0, 1)
    file.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        disk.open()
    assert "disk.vda.qcow2" not in [one.name for one in kind.driver().restore(source, ctx)]


def test_the_listing_of_one_vm_looks_into_no_other(kind: Kind, ctx: Context) -> None:
    driver, mine, other = kind.driver(), new_run(), new_run()
    kept = [driver.backup(new_artifacts(1000), run, ctx).source for run in (mine, mine, other)]
    of_vm = list(driver.sources_of(mine.vm.uuid, ctx))
    assert of_vm == [one for one in driver.sources(ctx) if one.source != kept[2]]
    assert list(driver.sources_of(new_run().vm.uuid, ctx)) == []
    assert list(driver.sources_of("*", ctx)) == [], "no pattern of rsync's"
    seen = driver._place().files(None, ctx, vm=mine.vm.uuid)
    assert not [path for path in seen if path.startswith(other.vm.uuid)]
