"""A datastore that is not the place which the catalog knows: each verb says so, and nothing comes of it."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from kept_in_files import DB, WEB

DRIVERS = ("files", "plain", "rsync")


def store_with(site, driver: str) -> Path:
    option = "target" if driver == "rsync" else "path"
    site.configure(datastores=f'[datastores.nas]\ndriver = "{driver}"\n{option} = "{site.store}"\n')
    return site.store


def mode(site, text: str) -> None:
    for vm in ("web1", "db1"):
        assert site.run("vm", "updateconf", vm, "--mode", text, "--keep-last", "2").code == 0


def unmount(site) -> Path:
    """What an unmounted disk leaves: its mount point, empty."""
    away = site.folder / "unmounted"
    site.store.rename(away)
    site.store.mkdir()
    return away


def mount(site, away: Path) -> None:
    shutil.rmtree(site.store)
    away.rename(site.store)


def catalog(site, *tables: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(site.state / "catalog.sqlite")) as connection:
        return [row for table in tables for row in connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2")]


def change(site, statement: str) -> None:
    with closing(sqlite3.connect(site.state / "catalog.sqlite")) as connection:
        connection.execute(statement)
        connection.commit()


def verbs(site) -> list[tuple[str, ...]]:
    return [
        ("backup", "web1"),
        ("backup", "db1"),
        ("backup", "web1", "--reset"),
        ("restore", "1", "--to", str(site.folder / "to")),
        ("restore", "1", "--verify-only"),
        ("image", "verify", "1"),
        ("image", "delete", "1", "--yes"),
        ("image", "flatten", "1"),
        ("image", "prune"),
        ("datastore", "check", "nas"),
        ("datastore", "show", "nas"),
        ("datastore", "maintain", "nas"),
        ("catalog", "check"),
        ("catalog", "rebuild", "nas"),
        ("check",),
    ]


def refused(site) -> None:
    before = catalog(site, "images", "increments", "datastores", "retired", "leftovers")
    there = sorted(path.relative_to(site.store) for path in site.store.rglob("*"))
    for setting in ("FULL", "INCREMENT"):
        mode(site, setting)
        for verb in verbs(site):
            if (verb, setting) == (("image", "prune"), "FULL"):
                continue  # nothing is to go
            told = site.run(*verb)
            assert told.code == 5, (verb, setting, told)
            if verb != ("check",):
                assert "vmkeep datastore adopt nas" in told.err, (verb, told)
            assert "damaged" not in told.out + told.err
    assert catalog(site, "images", "increments", "datastores", "retired", "leftovers") == before
    assert sorted(path.relative_to(site.store) for path in site.store.rglob("*")) == there


def chain_of_each(site) -> None:
    """An image of three increments that retention would flatten, and one of another VM."""
    assert site.run("vm", "updateconf", "web1", "--mode", "INCREMENT", "--keep-last", "0").code == 0
    for at in range(3):
        site.write(WEB, "vda", at * 65536, bytes([at + 1]) * 5000)
        assert site.run("backup", "web1").code == 0
    assert site.run("backup", "db1").code == 0


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_empty_mount_point_is_refused_by_every_verb_in_every_mode(site, driver):
    store_with(site, driver)
    chain_of_each(site)
    away = unmount(site)
    refused(site)
    mount(site, away)
    assert [one["state"] for one in site.run("image", "list", "--json").json] == ["open", "open"]
    site.write(WEB, "vda", 0, b"goes on" * 99)
    assert site.run("backup", "web1", "--json").json["type"] == "INCREMENT"
    assert site.run("image", "verify", "1").code == 0


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_disk_of_another_host_in_its_place_is_refused(site, beside, driver):
    store_with(site, driver)
    chain_of_each(site)
    away = unmount(site)
    table = site.config.read_text()
    beside.configure(datastores=table[table.index("[datastores.nas]") :])
    assert beside.run("backup", "db1").code == 0
    refused(site)
    shutil.rmtree(site.store)
    away.rename(site.store)
    assert site.run("backup", "web1", "--json").json["increment"] == 3


@pytest.mark.parametrize("driver", ["files", "rsync"])
def test_a_datastore_of_before_gets_its_identity_at_the_first_backup_that_finds_what_is_known(site, driver):
    store_with(site, driver)
    marker = site.store / (".identity" if driver == "files" else ".vmkeep-datastore")
    chain_of_each(site)
    marker.unlink()
    change(site, "DELETE FROM datastores")
    for verb in (("restore", "1", "--verify-only"), ("image", "verify", "1"), ("datastore", "check", "nas")):
        assert site.run(*verb).code == 0
        assert not marker.exists(), "what only reads has written"
    away = unmount(site)
    refused(site)
    mount(site, away)
    assert site.run("backup", "db1").code == 0
    identity = marker.read_text().strip()
    assert [row[:2] for row in catalog(site, "datastores")] == [("nas", identity)]
    shown = site.run("datastore", "show", "nas", "--json").json
    assert (shown["identity"], shown["images"], shown["absent"]) == (identity, [1, 2], [])
    # One that has its identity already is known by it wherever a known backup is found.
    change(site, "DELETE FROM datastores")
    assert site.run("image", "verify", "1").code == 0
    assert [row[:2] for row in catalog(site, "datastores")] == [("nas", identity)]


def test_where_the_disk_goes_while_a_backup_is_written_nothing_is_recorded(site):
    chain_of_each(site)
    before = catalog(site, "images", "increments")
    (site.store / "wait").touch()
    child = site.start("backup", "web1")
    site.until((site.store / "waits").exists, "the backup")
    away = unmount(site)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 5, err
    assert "vmkeep datastore adopt nas" in err
    assert catalog(site, "images", "increments") == before
    (away / "wait").unlink()
    mount(site, away)
    taken = site.run("backup", "web1", "--json").json
    assert (taken["type"], taken["increment"]) == ("INCREMENT", 3)
    assert site.run("image", "verify", "1").code == 0


def test_where_the_disk_goes_while_it_is_verified_nothing_is_damaged(site):
    chain_of_each(site)
    (site.store / "wait-restore").touch()
    child = site.start("image", "verify", "1")
    site.until((site.store / "waits").exists, "the verify")
    unmount(site)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 5, (out, err)
    assert site.run("image", "list", "--json").json[0]["state"] == "open"


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_new_place_is_adopted_and_the_old_one_again(site, driver):
    store_with(site, driver)
    chain_of_each(site)
    away = unmount(site)
    told = site.run("datastore", "adopt", "nas")
    assert (told.code, "--yes" in told.err) == (2, True)
    assert "2 images do not lie there, and become absent: 1 (web1), 2 (db1)" in told.out
    assert not list(site.store.iterdir()), "asked, and nothing written yet"
    done = site.run("datastore", "adopt", "nas", "--yes", "--json").json
    assert (done["absent"], done["images"], done["moved"]) == ([1, 2], [], [])
    assert (done["identity"] is None) == (driver == "plain")
    assert [one["state"] for one in site.run("image", "list", "--json").json] == ["absent", "absent"]
    # What lies elsewhere is neither gone on with, nor counted, nor taken for damaged.
    assert site.run("restore", "1", "--verify-only").code == 5
    assert site.run("image", "verify", "1").code == 5
    assert site.run("image", "flatten", "1").code == 5
    mode(site, "FULL")
    numbers = [site.run("backup", "web1", "--json").json["image"] for _ in range(3)]
    states = {one["id"]: one["state"] for one in site.run("image", "list", "--json").json}
    assert numbers == [3, 4, 5]
    assert states == {1: "absent", 2: "absent", 4: "closed", 5: "open"}, "KEEP_LAST=2 counts what is here"
    assert site.run("catalog", "check").code == 0
    # The old disk comes back.
    site.store.rename(site.folder / "second")
    away.rename(site.store)
    assert site.run("backup", "web1").code == 5
    assert site.run("datastore", "adopt", "nas", "--yes").code == 0
    states = {one["id"]: one["state"] for one in site.run("image", "list", "--json").json}
    assert states == {1: "closed", 2: "closed", 4: "absent", 5: "absent"}
    assert site.run("image", "verify", "1").code == 0
    told = site.run("image", "delete", "4", "--yes")
    assert "is forgotten; it lies elsewhere" in told.out
    assert site.run("backup", "web1").code == 0


def test_a_datastore_that_got_another_name_goes_on_and_its_images_can_follow(site):
    chain_of_each(site)
    site.configure(datastores=f'[datastores.vault]\ndriver = "files"\npath = "{site.store}"\n')
    assert site.run("backup", "web1", "--json").json["type"] == "FULL"
    for verb in (("restore", "1", "--verify-only"), ("image", "verify", "1"), ("image", "delete", "1", "--yes")):
        told = site.run(*verb)
        assert (told.code, "vmkeep datastore adopt NAME" in told.err) == (4, True), told
    done = site.run("datastore", "adopt", "vault", "--yes", "--json").json
    assert done["moved"] == [{"id": 1, "from": "nas"}, {"id": 2, "from": "nas"}]
    assert done["identity"] == done["identity_before"]
    assert site.run("image", "verify", "1").code == 0
    assert {one["datastore"] for one in site.run("image", "list", "--json").json} == {"vault"}


def test_absent_images_follow_where_their_place_gets_a_name_of_its_own(site):
    """Two disks that took turns under one name."""
    chain_of_each(site)
    away = unmount(site)
    assert site.run("datastore", "adopt", "nas", "--yes").code == 0
    assert site.run("backup", "web1", "--json").json["image"] == 3
    first = f'[datastores.first]\ndriver = "files"\npath = "{away}"\n'
    site.configure(datastores=f'[datastores.nas]\ndriver = "files"\npath = "{site.store}"\n{first}')
    assert "vmkeep datastore adopt" in site.run("restore", "1", "--verify-only").err
    done = site.run("datastore", "adopt", "first", "--yes", "--json").json
    assert done["moved"] == [{"id": 1, "from": "nas"}, {"id": 2, "from": "nas"}]
    listed = {one["id"]: (one["datastore"], one["state"]) for one in site.run("image", "list", "--json").json}
    assert listed == {1: ("first", "closed"), 2: ("first", "closed"), 3: ("nas", "open")}
    assert site.run("restore", "1", "--verify-only").code == 0
    assert site.run("catalog", "check").code == 0


def test_a_copy_that_gave_each_backup_another_token_is_adopted_with_its_images(site):
    """As `restic copy` does; the repository that it was made of is gone."""
    chain_of_each(site)
    away = unmount(site)
    assert site.run("datastore", "adopt", "nas", "--yes").code == 0
    for number, source in enumerate(sorted(away.glob("[!.]*/"))):
        source.rename(site.store / f"{number:032}")
    told = site.run("catalog", "rebuild", "nas")
    assert (told.code, told.out.count("vmkeep datastore adopt nas")) == (0, 4), told
    done = site.run("datastore", "adopt", "nas", "--yes", "--json").json
    assert (done["images"], done["absent"]) == ([1, 2], [])
    for image in ("1", "2"):
        assert site.run("restore", image, "--verify-only").code == 0
    assert site.run("catalog", "check").code == 0
    assert [one["state"] for one in site.run("image", "list", "--json").json] == ["closed", "closed"]


def test_two_names_of_one_place(site):
    both = "".join(f'[datastores.{name}]\ndriver = "files"\npath = "{site.store}"\n' for name in ("nas", "vault"))
    site.configure(datastores=both)
    for name in ("nas", "vault", "nas", "vault"):
        assert site.run("backup", "web1", "-d", name).code == 0
    rows = catalog(site, "datastores")
    assert rows[0][1] == rows[1][1]
    assert site.run("catalog", "check").code in (0, 3)


def test_a_place_whose_last_backups_were_really_removed_is_adopted_where_nothing_else_tells(site):
    store_with(site, "plain")
    first = site.run("backup", "web1", "--json").json
    shutil.rmtree(site.store / first["source"])
    told = site.run("backup", "web1")
    assert told.code == 5
    assert "or all backups in it were removed: vmkeep datastore adopt nas" in told.err
    assert site.run("datastore", "adopt", "nas", "--yes").code == 0
    assert site.run("backup", "web1", "--json").json["type"] == "FULL"


def test_where_the_marker_was_seen_what_is_gone_is_gone(site):
    first = site.run("backup", "web1", "--json").json
    shutil.rmtree(site.store / first["source"])
    assert site.run("image", "verify", "1").code == 8
    assert site.run("image", "delete", "1", "--yes").code == 0


@pytest.fixture
def marked(site):
    store_with(site, "rsync")
    assert site.run("backup", "web1").code == 0
    marker = site.store / ".vmkeep-datastore"
    assert site.run("datastore", "show", "nas").code == 0
    return marker


@pytest.mark.parametrize("hostile", ["garbage", "long", "empty", "link", "fifo", "folder"])
def test_a_marker_that_is_none_is_no_identity(site, marked, hostile):
    elsewhere = site.folder / "elsewhere"
    marked.rename(elsewhere)
    match hostile:
        case "garbage":
            marked.write_text("../../etc/passwd")
        case "long":
            with marked.open("wb") as file:
                file.write(elsewhere.read_bytes())
                file.truncate(1 << 40)
        case "empty":
            marked.touch()
        case "link":
            marked.symlink_to(elsewhere)
        case "fifo":
            os.mkfifo(marked)
        case "folder":
            marked.mkdir()
    was = marked.lstat()
    told = site.run("backup", "web1")
    assert told.code == 5, told
    assert site.run("datastore", "adopt", "nas", "--yes").code == 5, "it does not take the place of what is there"
    now = marked.lstat()
    assert (now.st_ino, now.st_size, now.st_mtime_ns) == (was.st_ino, was.st_size, was.st_mtime_ns)
    assert len(site.run("image", "list", "--json").json) == 1


def test_two_first_backups_at_once_end_with_one_identity(site):
    (site.store / "wait").touch()
    both = [site.start("backup", vm.name) for vm in (WEB, DB)]
    site.until((site.store / "waits").exists, "a backup")
    (site.store / "wait").unlink()
    assert [child.wait(60) for child in both] == [0, 0]
    assert [row[1] for row in catalog(site, "datastores")] == [(site.store / ".identity").read_text()]


def test_a_check_of_a_new_datastore_leaves_nothing(site):
    store_with(site, "rsync")
    assert site.run("datastore", "check", "nas").code == 0
    assert not list(site.store.iterdir())
    shown = site.run("datastore", "show", "nas", "--json").json
    assert (shown["identity"], shown["known_since"]) == (None, None)
    assert not list(site.store.iterdir())


def test_a_rebuild_knows_the_place_from_then_on(site, beside):
    assert site.run("backup", "web1").code == 0
    assert beside.run("catalog", "rebuild", "nas").code == 0
    assert [row[1] for row in catalog(beside, "datastores")] == [(site.store / ".identity").read_text()]
    # All that it has found was replaced since.
    assert site.run("vm", "updateconf", "web1", "--mode", "FULL", "--keep-last", "1").code == 0
    assert site.run("backup", "web1").code == 0
    assert len(beside.run("catalog", "rebuild", "nas", "--json").json["added"]) == 1


def test_what_a_place_is_known_by_may_be_damaged_in_the_catalog(site):
    assert site.run("backup", "web1").code == 0
    change(site, "UPDATE datastores SET since = x'00'")
    told = site.run("backup", "web1")
    assert (told.code, "vmkeep datastore adopt nas" in told.err) == (8, True), told
    assert site.run("datastore", "adopt", "nas", "--yes").code == 0
    assert site.run("backup", "web1", "--json").json["type"] == "INCREMENT"
