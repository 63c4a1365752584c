"""A state folder without room, or that cannot be written to."""

from __future__ import annotations

import gc
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import kept_in_files
import pytest
from kept_in_files import WEB

from vmkeep import full_state
from vmkeep.catalog.database import Catalog


@pytest.fixture
def state(site) -> Iterator[Path]:
    """The state folder as a file system of 3 MiB."""
    if os.geteuid():
        pytest.skip("only root can mount")
    site.state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "lab", site.state], check=True)
    yield site.state
    kept_in_files.let_go()
    gc.collect()  # the traceback of a run that failed keeps its tables of digests open
    subprocess.run(["umount", site.state], check=True)


def fill(state: Path, left: int) -> None:
    """Leave so many KiB of it."""
    free = os.statvfs(state).f_bavail * os.statvfs(state).f_frsize
    (state / "somebody else's").write_bytes(bytes(free - left * 1024))


@pytest.mark.parametrize("left", [0, 16, 64], ids=["not even a lock", "an I/O error for SQLite", "full for SQLite"])
def test_a_backup_says_which_file_system_is_full(site, state, left):
    fill(state, left)
    told = site.run("backup", "web1")
    assert (told.code, told.err.count("\n")) == (6, 2)
    assert f"the file system of the state folder {state} is full\n" in told.err
    assert not list(site.store.iterdir()), "the datastore was not touched"
    (state / "somebody else's").unlink()
    assert site.run("backup", "web1").code == 0


@pytest.fixture(params=["full", "read-only"])
def rescued(site, state, request) -> Path:
    """The state folder of two backups, as it is found on the day of a restore."""
    for data in (b"first", b"second"):
        site.write(WEB, "vda", 0, data)
        assert site.run("backup", "web1").code == 0
    if request.param == "full":
        fill(state, 0)
    else:
        subprocess.run(["mount", "-o", "remount,ro", state], check=True)
    return state


@pytest.mark.parametrize(
    "command",
    [
        ["image", "list"],
        ["image", "show", "1"],
        ["image", "verify", "1"],
        ["vm", "list"],
        ["vm", "show", "web1"],
        ["datastore", "list"],
        ["datastore", "check", "nas"],
        ["backup", "web1", "--dry-run"],
    ],
    ids=" ".join,
)
def test_what_only_reads_works(site, rescued, command):
    told = site.run(*command)
    assert told.code == 0, told.err
    assert "warning" not in told.err


def test_a_full_folder_for_temporary_files_is_told_as_that(site, rescued, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "lab", temporary], check=True)
    try:
        monkeypatch.setattr("tempfile.tempdir", str(temporary))
        told = site.run("image", "list")
        assert told.code == 6
        assert f"the folder for temporary files {temporary} is full" in told.err
    finally:
        subprocess.run(["umount", temporary], check=True)


def test_a_restore_works(site, rescued):
    told = site.run("restore", "1", "--to", str(site.folder / "back"), "--format", "raw", "--json")
    assert told.code == 0, told.err
    assert Path(told.json["disks"][0]["path"]).read_bytes().startswith(b"second")


def test_a_backup_to_such_a_state_folder_touches_nothing(site, rescued):
    there = sorted(site.store.iterdir())
    told = site.run("backup", "web1")
    assert told.code in (6, 7)
    assert str(rescued) in told.err
    assert "bug" not in told.err
    assert ("mounted read-only" in told.err) == (told.code == 7)
    assert sorted(site.store.iterdir()) == there


def test_a_log_that_a_killed_process_has_left_is_read(site, tmp_path):
    site.run("backup", "web1")
    original = site.state / "catalog.sqlite"
    left = tmp_path / "left"
    left.mkdir(mode=0o555)
    with Catalog.open(original).writing() as connection:
        connection.execute("UPDATE images SET pinned = 1")
        connection.execute("COMMIT")
        for file in site.state.glob("catalog.sqlite*"):  # not yet in the file itself
            (left / file.name).write_bytes(file.read_bytes())
        connection.execute("BEGIN")
    (left / "catalog.sqlite-shm").unlink()
    assert (left / "catalog.sqlite-wal").stat().st_size
    subprocess.run(["mount", "--bind", left, left], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", left], check=True)
        with Catalog.open(left / "catalog.sqlite", create=False).reading() as connection:
            assert connection.execute("SELECT pinned FROM images").fetchone()[0] == 1
    finally:
        subprocess.run(["umount", left], check=True)


def test_room_for_the_record_is_kept_while_somebody_fills_the_file_system(site, state):
    site.configure(extra='plugins = ["kept_in_files:Filler"]')
    told = site.run("backup", "web1")
    assert told.code == 0, told.err
    assert os.statvfs(state).f_bavail * os.statvfs(state).f_frsize <= full_state.RECORD_ROOM + (64 << 10)
    assert len(site.run("image", "list", "--json").json) == 1


def test_what_was_stored_and_could_not_be_recorded_is_recorded_by_the_next_backup(site, state):
    site.configure(extra='plugins = ["kept_in_files:Filler"]')
    (site.folder / "greedy").touch()
    told = site.run("backup", "web1")
    assert told.code == 6, told.err
    assert "the next backup of web1 records it" in told.err
    assert len(list(site.store.glob("[!.]*"))) == 1
    kept_in_files.let_go()
    (state / "somebody else's").unlink()
    site.configure()
    told = site.run("backup", "web1")
    assert told.code == 0, told.err
    assert "had stored increment 0 of image 1" in told.err
    (first, _second) = site.run("image", "list", "--json").json
    assert first["state"] == "closed"
    assert len(list(site.store.glob("[!.]*"))) == 2
    assert not list((state / "runs").iterdir())


def test_a_check_makes_no_state_folder(site):
    told = site.run("check")
    assert told.code == 0, told.out
    assert f"{site.state} (the first backup makes it)" in told.out
    assert not site.state.exists()
    site.configure(extra="")
    (site.folder / "file").touch()
    site.config.write_text(site.config.read_text().replace(str(site.state), f"{site.folder}/file/state"))
    told = site.run("check")
    assert told.code != 0
    assert f"cannot be made in {site.folder}/file" in told.out
