"""Repositories that are no folder of this host, on real servers: SFTP, restic's REST protocol, S3."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from restic_odd import BrokenArtifact

from backupcore.context import Context
from backupcore.errors import AccessDenied, BackupError, HypervisorError, Locked, SourceNotFound, TargetUnavailable
from backupcore.model import BackupRun, BytesArtifact
from backupcore_restic import Restic
from lab.servers import free_port, rclone, sshd

SECRET = "wJalrXUtnFEMI"
pytestmark = pytest.mark.usefixtures("no_other_host")


@pytest.fixture(params=["sftp", "rest", "s3"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, object]]:
    """The options that lead to a repository which does not exist yet."""
    place = tmp_path / "served"
    place.mkdir()
    if request.param == "sftp":
        (tmp_path / "keys").mkdir()
        with sshd(tmp_path / "keys") as server:
            command = " ".join([*server.client, f"{server.user}@127.0.0.1", "-s", "sftp"])
            yield {
                "repository": f"sftp:{server.user}@127.0.0.1:{place}/repository",
                "restic_options": [f"sftp.command={command}"],
            }
    elif request.param == "rest":
        with rclone(place, "restic", "--user", "me", "--pass", SECRET) as port:
            yield {"repository": f"rest:http://me:{SECRET}@127.0.0.1:{port}/web/"}
    else:
        (place / "bucket").mkdir()
        keys = tmp_path / "keys"
        keys.write_text(f"AWS_ACCESS_KEY_ID=AKIALAB\nAWS_SECRET_ACCESS_KEY={SECRET}\n")
        keys.chmod(0o600)
        with rclone(place, "s3", "--auth-key", f"AKIALAB,{SECRET}", "--force-path-style") as port:
            yield {"repository": f"s3:http://127.0.0.1:{port}/bucket/web", "environment_file": str(keys)}


def test_a_repository_on_a_server(
    table: dict[str, object],
    options: Callable[..., Restic],
    ctx: Context,
    make_run: Callable[..., BackupRun],
    make_artifacts: Callable[..., list[BytesArtifact]],
    quicken: Callable[[Path], None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    driver = options(**table)
    assert driver.check(ctx), "the first backup creates it"
    assert driver.usage(ctx).used is None
    run, given = make_run(), make_artifacts()
    driver.prebackup(run, ctx)
    if not driver.repository.startswith("s3:"):  # there rclone goes on naming the key that it has seen
        quicken(next((tmp_path / "served").rglob("config")).parent)
    source = driver.backup(given, run, ctx).source
    [listed] = driver.sources(ctx)
    assert listed.source == source
    assert listed.labels == run.labels
    disk = next(one for one in driver.restore(source, ctx) if one.name == "disk.vda.qcow2")
    with disk.open() as stream:
        assert stream.read() == given[0].data
    driver.prebackup(make_run(builds_on=(source,)), ctx)
    usage = driver.usage(ctx)
    assert usage.used
    assert usage.used > len(given[0].data)
    assert usage.total is None
    assert driver.delete([source], ctx)
    with pytest.raises(SourceNotFound):
        driver.restore(source, ctx)
    assert SECRET not in caplog.text
    assert SECRET not in repr(driver)


def test_a_server_that_deletes_nothing(
    options: Callable[..., Restic],
    ctx: Context,
    make_run: Callable[..., BackupRun],
    make_artifacts: Callable[..., list[BytesArtifact]],
    quicken: Callable[[Path], None],
    tmp_path: Path,
) -> None:
    """It is told at once, and as a policy; restic would try it for a minute and a half."""
    place = tmp_path / "served"
    place.mkdir()
    with rclone(place, "restic", "--append-only") as port:
        driver = options(f"rest:http://127.0.0.1:{port}/web/")
        assert driver.check(ctx), "the first backup creates it"
        run = make_run()
        driver.prebackup(run, ctx)
        quicken(place / "web")
        source = driver.backup(make_artifacts(), run, ctx).source
        began = time.monotonic()
        with pytest.raises(Locked, match="403") as caught:
            driver.delete([source], ctx)
        assert time.monotonic() - began < 20
        assert caught.value.until is None
        assert [one.source for one in driver.sources(ctx)] == [source]
        driver.prebackup(make_run(builds_on=(source,)), ctx)
        broken = [BrokenArtifact("disk.vdb.qcow2", 4 << 20), *make_artifacts()]
        with pytest.raises(HypervisorError):
            driver.backup(broken, make_run(), ctx)
        # Over there somebody lets go of all of it: there is something to prune.
        options(str(place / "web")).delete([source], ctx)
        began = time.monotonic()
        with pytest.raises(Locked, match="403") as caught:
            driver.maintain(ctx)
        assert time.monotonic() - began < 20
        assert "pruned where it lies" in caught.value.hint


def test_a_server_whose_storage_is_away_need_not_have_lost_its_password(
    options: Callable[..., Restic],
    ctx: Context,
    make_run: Callable[..., BackupRun],
    make_artifacts: Callable[..., list[BytesArtifact]],
    tmp_path: Path,
) -> None:
    """One that keeps in mind what it has served shows a configuration and no key: restic takes that for a password."""
    place = tmp_path / "served"
    place.mkdir()
    with rclone(place, "restic") as port:
        driver = options(f"rest:http://127.0.0.1:{port}/")
        driver.prebackup(make_run(), ctx)
        source = driver.backup(make_artifacts(), make_run(), ctx).source
        place.rename(tmp_path / "away")
        place.mkdir()
        with pytest.raises(AccessDenied, match="no key found") as caught:
            driver.prebackup(make_run(builds_on=(source,)), ctx)
        assert "is the storage of its server mounted?" in caught.value.hint
        with pytest.raises(AccessDenied):
            driver.prebackup(make_run(), ctx)
        assert not list(place.iterdir()), "nothing is begun anew there"


def test_a_server_that_has_gone(table: dict[str, object], options: Callable[..., Restic], ctx: Context) -> None:
    place = str(table["repository"])
    if place.startswith("sftp:"):
        command = f"sftp.command=ssh -F none -o BatchMode=yes -p {free_port()} 127.0.0.1 -s sftp"
        driver = options(**(table | {"restic_options": [command]}))
    else:
        port = place.rpartition("127.0.0.1:")[2].partition("/")[0]
        driver = options(**(table | {"repository": place.replace(port, str(free_port())), "timeout": 30}))
    with pytest.raises(TargetUnavailable) as caught:
        driver.check(ctx)
    error: BackupError = caught.value
    assert SECRET not in f"{error} {error.hint}"
