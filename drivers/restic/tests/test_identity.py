"""What a repository is known by: its own ID, which costs nothing where the folder can be looked at."""

from __future__ import annotations

import shutil

import pytest

from lab.servers import rclone


def test_a_repository_in_a_folder(tmp_path, options, ctx, make_run, quicken):
    driver = options(tmp_path / "repository")
    assert driver.identity("", ctx) is None
    assert not (tmp_path / "repository").exists()
    driver.prebackup(make_run(), ctx)
    quicken(tmp_path / "repository")
    found = driver.identity("", ctx)
    # Known again without restic, which would have to derive its key.
    without = options(tmp_path / "repository", binary="/not/there")
    assert without.identity(found, ctx) == found
    shutil.copytree(tmp_path / "repository", tmp_path / "copy")
    assert options(tmp_path / "copy").identity(found, ctx) == found
    # Its configuration was written anew, as by a later restic.
    short = f"{found.partition('.')[0]}.{'0' * 32}"
    assert driver.identity(short, ctx) == short
    other = options(tmp_path / "other")
    other.prebackup(make_run(), ctx)
    assert other.identity(found, ctx) not in (found, None)
    (tmp_path / "repository").rename(tmp_path / "away")
    (tmp_path / "repository").mkdir()
    assert driver.identity(found, ctx) is None


@pytest.mark.usefixtures("no_other_host")
def test_a_repository_at_a_server(tmp_path, options, ctx, make_run, make_artifacts, quicken):
    (tmp_path / "served").mkdir()
    with rclone(tmp_path / "served", "restic") as port:
        driver = options(f"rest:http://127.0.0.1:{port}/web/")
        assert driver.identity("", ctx) is None
        run = make_run()
        driver.prebackup(run, ctx)
        quicken(next((tmp_path / "served").rglob("config")).parent)
        found = driver.identity("", ctx)
        driver.backup(make_artifacts(1000), run, ctx)
        # The backup has asked beside its own opening; what it found counts once.
        assert driver._seen(ctx) == {"id": found}
        assert driver.identity(found, ctx) == found
        assert driver._seen(ctx) == {}
        folder = options(next((tmp_path / "served").rglob("config")).parent)
        assert folder.identity(found, ctx) == found, "the same one, reached by another way"
    (tmp_path / "empty").mkdir()
    with rclone(tmp_path / "empty", "restic") as port:
        assert options(f"rest:http://127.0.0.1:{port}/web/").identity(found, ctx) is None
