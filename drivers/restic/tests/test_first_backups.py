"""Several first backups at once into a repository that does not exist yet: all of them are stored, and it is sound."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from backupcore.context import Context
from backupcore.errors import AccessDenied, TargetUnavailable
from backupcore.model import BackupRun, BytesArtifact
from backupcore_restic import Restic, creation
from backupcore_restic.repository import Repository
from lab import at_once
from lab.servers import rclone, sshd

Options = Callable[..., Restic]
Runs = Callable[..., BackupRun]
Artifacts = Callable[..., list[BytesArtifact]]


def back_up_at_once(
    drivers: list[Restic],
    ctx: Context,
    make_run: Runs,
    make_artifacts: Artifacts,
    quicken: Callable[[Path], None],
    folder: Path,
) -> None:
    runs = [replace(make_run(f"vm{number}"), host=f"host{number}", settings={}) for number in range(len(drivers))]
    given = [make_artifacts(100_000) for _ in runs]
    work = zip(drivers, given, runs, (folder / f"run{number}" for number in range(len(runs))), strict=True)
    tokens = at_once.tokens(list(work))
    assert len(Repository(drivers[0]).keys(ctx, 60)) == 1
    if not drivers[0].repository.startswith("s3:"):  # there rclone goes on naming the key that it has seen
        quicken(next(folder.rglob("config")).parent)
    for driver in drivers:
        listed = {one.source.token: one for one in driver.sources(ctx)}
        assert set(listed) == set(tokens)
    for token, artifacts in zip(tokens, given, strict=True):
        disk = next(one for one in drivers[0].restore(listed[token].source, ctx) if one.name == "disk.vda.qcow2")
        with disk.open() as stream:
            assert stream.read() == artifacts[0].data


@pytest.mark.parametrize("there", ["not there", "empty"])
def test_in_a_folder(
    there: str,
    options: Options,
    ctx: Context,
    make_run: Runs,
    make_artifacts: Artifacts,
    quicken: Callable[[Path], None],
    tmp_path: Path,
) -> None:
    place = tmp_path / "repository"
    if there == "empty":
        place.mkdir()
    drivers = [options(place, cache=str(tmp_path / f"cache{number}")) for number in range(4)]
    back_up_at_once(drivers, ctx, make_run, make_artifacts, quicken, tmp_path)
    assert sorted(path.name for path in place.iterdir()) == ["config", "data", "index", "keys", "locks", "snapshots"]


@pytest.fixture(
    params=["rest", pytest.param("sftp", marks=pytest.mark.soak), pytest.param("s3", marks=pytest.mark.soak)]
)
def names(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[dict[str, object]]]:
    """Options that lead to the same new repository on a server, by two names of it: so do two hosts."""
    place = tmp_path / "served"
    place.mkdir()
    if request.param == "sftp":
        (tmp_path / "keys").mkdir()
        with sshd(tmp_path / "keys") as server:
            command = " ".join([*server.client, f"{server.user}@127.0.0.1", "-s", "sftp"])
            yield [
                {"repository": f"sftp:{host}:{place}/repository", "restic_options": [f"sftp.command={command}"]}
                for host in ("127.0.0.1", "localhost")
            ]
    elif request.param == "rest":
        with rclone(place, "restic") as port:
            yield [{"repository": f"rest:http://{host}:{port}/web/"} for host in ("127.0.0.1", "localhost")]
    else:
        (place / "bucket").mkdir()
        (tmp_path / "keys").write_text("AWS_ACCESS_KEY_ID=AKIALAB\nAWS_SECRET_ACCESS_KEY=secret\n")
        (tmp_path / "keys").chmod(0o600)
        with rclone(place, "s3", "--auth-key", "AKIALAB,secret", "--force-path-style") as port:
            yield [
                {"repository": f"s3:http://{host}:{port}/bucket/web", "environment_file": str(tmp_path / "keys")}
                for host in ("127.0.0.1", "localhost")
            ]


@pytest.mark.parametrize("hosts", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_on_a_server(
    hosts: int,
    names: list[dict[str, object]],
    options: Options,
    ctx: Context,
    make_run: Runs,
    make_artifacts: Artifacts,
    quicken: Callable[[Path], None],
    tmp_path: Path,
) -> None:
    drivers = [
        options(**names[number % hosts], cache=str(tmp_path / f"cache{number}"), lock_wait=60) for number in range(2)
    ]
    back_up_at_once(drivers, ctx, make_run, make_artifacts, quicken, tmp_path)


@pytest.mark.parametrize("tries", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_keys_of_a_creation_that_did_not_count_are_removed(
    tries: int, options: Options, ctx: Context, pristine: Path, make_run: Runs, tmp_path: Path
) -> None:
    other = tmp_path / "other" / "repository"
    other.parent.mkdir()
    options(other).prebackup(make_run(), ctx)
    mixed = shutil.copytree(pristine, tmp_path / "served" / "web")
    if tries:  # so that the one whose key is tried first is once the right and once the wrong one
        shutil.copy(other / "config", tmp_path / "config")
        (mixed / "config").unlink()
        shutil.copy(tmp_path / "config", mixed / "config")
    for key in (other / "keys").iterdir():
        shutil.copy(key, mixed / "keys")
    with rclone(tmp_path / "served", "restic") as port:
        driver = options(f"rest:http://127.0.0.1:{port}/web/")
        driver.prebackup(make_run(), ctx)
        creation.settle(driver, ctx)
        assert len(list((mixed / "keys").iterdir())) == 1
        assert driver.check(ctx)


def test_a_creation_that_is_under_way_is_waited_for(
    options: Options, ctx: Context, pristine: Path, make_run: Runs, tmp_path: Path
) -> None:
    place = shutil.copytree(pristine, tmp_path / "repository")
    (place / "config").rename(tmp_path / "config")

    def finish() -> None:
        time.sleep(1)  # the other creation takes its time; nothing is waited for by it
        (tmp_path / "config").rename(place / "config")

    other = threading.Thread(target=finish)
    other.start()
    options(place).prebackup(make_run(), ctx)
    other.join()
    assert len(list((place / "keys").iterdir())) == 1


def test_one_that_was_interrupted_is_named(
    options: Options,
    ctx: Context,
    pristine: Path,
    make_run: Runs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = shutil.copytree(pristine, tmp_path / "repository")
    (place / "config").unlink()
    monkeypatch.setattr(creation, "UNDER_WAY", 0.5)
    with pytest.raises(TargetUnavailable, match="its creation was interrupted") as caught:
        options(place).prebackup(make_run(), ctx)
    assert "Empty the folder" in caught.value.hint
    with pytest.raises(TargetUnavailable, match="interrupted"):
        options(place, timeout=1).check(ctx)
    for path in (place / "keys").iterdir():  # before its key nothing counts: it is made anew
        path.unlink()
    (place / "keys.left").mkdir()
    assert options(place).check(ctx)
    options(place).prebackup(make_run(), ctx)
    assert not (place / "keys.left").exists()


def test_a_repository_that_has_lost_its_configuration_is_not_made_anew(
    options: Options, ctx: Context, fresh: Restic, make_run: Runs, make_artifacts: Artifacts
) -> None:
    fresh.backup(make_artifacts(1000), make_run(), ctx)
    Path(fresh.repository, "config").unlink()
    for call in (lambda: fresh.prebackup(make_run(), ctx), lambda: fresh.check(ctx)):
        with pytest.raises(TargetUnavailable, match="without its file config") as caught:
            call()
        assert "remove nothing" in caught.value.hint


def test_whoever_comes_second_must_have_the_same_password(
    options: Options, ctx: Context, make_run: Runs, tmp_path: Path
) -> None:
    (tmp_path / "another").write_text("battery staple\n")
    first, second = options(tmp_path / "r"), options(tmp_path / "r", password_file=str(tmp_path / "another"))
    first.prebackup(make_run(), ctx)
    with pytest.raises(AccessDenied):
        second.prebackup(make_run(), ctx)
