"""How often a backup starts restic, each of which takes half a second to derive its key; and that it misses nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable

import pytest
from kept_in_files import WEB

from lab.servers import rclone


@pytest.fixture
def counted(site):
    """Has the datastore be a repository; gives a function for the commands of each restic since it was asked last."""
    password = site.folder / "password"
    password.write_text("correct horse\n")
    password.chmod(0o600)
    noted, wrapper = site.folder / "noted", site.folder / "restic"
    wrapper.write_text(f'#!/bin/sh\necho "$*" >>{noted}\nexec {shutil.which("restic")} "$@"\n')
    wrapper.chmod(0o755)

    def asked() -> list[str]:
        lines = noted.read_text().splitlines() if noted.exists() else []
        noted.unlink(missing_ok=True)
        return [next(word for word in line.split() if not word.startswith("-")) for line in lines]

    def begin(repository: object) -> Callable[[], list[str]]:
        site.configure(
            datastores=f'[datastores.nas]\ndriver = "restic"\nrepository = "{repository}"\n'
            f'cache = "{site.folder}/cache"\npassword_file = "{password}"\nbinary = "{wrapper}"\n'
        )
        return asked

    return begin


def night(site, code=0, vm="web1"):
    site.write(WEB, "vda", 70_000, b"another" * 1000)
    told = site.run("backup", vm, "--json")
    assert told.code == code, told.err
    return json.loads(told.out)


def restic(site, *arguments):
    told = subprocess.run(
        ["restic", "-r", site.store, "-p", site.folder / "password", "--no-cache", *arguments],
        capture_output=True,
        check=True,
        text=True,
    )
    return told.stdout


def test_an_increment_starts_restic_once_and_notices_what_others_do(site, counted):
    started = counted(site.store)
    night(site)
    night(site, vm="db1")
    started()
    assert (night(site)["type"], started()) == ("INCREMENT", ["backup"])
    # What the catalog does not know may be of this VM: another word says.
    restic(site, "backup", "--tag=mine", site.folder / "password")
    assert (night(site)["type"], started()) == ("INCREMENT", ["snapshots", "backup"])
    restic(site, "forget", "--keep-tag=backupcore")
    # What was removed is noticed by the folder alone.
    last = night(site)
    restic(site, "forget", last["source"])
    started()
    done = night(site, code=3)
    assert (done["type"], "no longer in datastore nas" in done["reason"]) == ("FULL", True)
    assert started() == ["list", "backup"]
    # So is one that has another ID by now.
    restic(site, "tag", "--add=kept", done["source"])
    started()
    again = night(site)
    assert (again["type"], again["image"], started()[0]) == ("INCREMENT", done["image"], "snapshots")


@pytest.mark.soak  # more than ten starts of restic, of two seconds each
def test_an_increment_to_a_server_looks_at_the_place_before_it_and_after_it(site, counted):
    """By a server each answer takes restic, and the password."""
    with rclone(site.store, "restic") as port:
        started = counted(f"rest:http://127.0.0.1:{port}/")
        night(site)
        started()
        assert night(site)["type"] == "INCREMENT"
        done = started()
    # restic 0.14 lists once more after the backup: it tells no more than the beginning of the new snapshot's ID.
    assert sorted(done) in (["backup", "cat", "cat", "list", *["snapshots"] * count] for count in (1, 2))
