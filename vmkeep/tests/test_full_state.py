"""A state folder without room."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def state(site) -> Iterator[Path]:
    """The state folder as a file system of 1 MiB."""
    if os.geteuid():
        pytest.skip("only root can mount")
    site.state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "lab", site.state], check=True)
    yield site.state
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
