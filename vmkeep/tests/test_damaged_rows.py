"""Rows of the catalog that are wrong: named, with the way out, and no other VM's business."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import pytest
from kept_in_files import DB, WEB

OF_AN_INCREMENT = {
    "a date": "date = '9999-99-99'",
    "no date": "date = ''",
    "a date without a zone": "date = '2026-01-01T00:00:00'",
    "a type": "type = 'bogus'",
    "half a JSON": "disks = '{'",
    "another JSON": "disks = '[1,2]'",
    "a JSON of nothing": "disks = '[{}]'",
    "a size": "size = 'abc'",
    "a source": "source = '../../../etc'",
    "a source of bytes": "source = x'00ff'",
    "what proves its disks": "probes = '[1]'",
    "a parent": "pid = 'x'",
    "a point": "point = x'00'",
    "a reason with a flipped bit": "reason = CAST(x'77e56231' AS TEXT)",
}
OF_AN_IMAGE = {
    "a name with a flipped bit": "vm_name = CAST(x'77e56231' AS TEXT)",
    "a name of bytes": "vm_name = x'ff00'",
    "its beginning": "began = 'xx'",
    "a state": "state = 'bogus'",
    "a host of bytes": "host = x'ff'",
}


def change(site, statement: str) -> None:
    with closing(sqlite3.connect(site.state / "catalog.sqlite")) as catalog, catalog:
        catalog.execute(statement)


@pytest.fixture
def both(site, once):
    """Two backups of web1, pinned, and one of db1."""

    def make(site):
        for vm in ("web1", "db1", "web1"):
            assert site.run("backup", vm).code == 0
        assert site.run("image", "pin", "1").code == 0

    once(site, make)
    return site


@pytest.mark.parametrize("what", [*OF_AN_INCREMENT, *OF_AN_IMAGE])
def test_a_row_that_is_wrong_is_named_and_stops_no_other_vm(both, what):
    site = both
    if what in OF_AN_INCREMENT:
        change(site, f"UPDATE increments SET {OF_AN_INCREMENT[what]} WHERE image = 1 AND id = 1")
        named = "image 1, increment 1, is damaged"
    else:
        change(site, f"UPDATE images SET {OF_AN_IMAGE[what]} WHERE number = 1")
        named = "image 1, is damaged"
    for verb in (["image", "show", "1"], ["image", "verify", "1"], ["restore", "1", "--verify-only"]):
        told = site.run(*verb, "--json")
        assert (told.code, named in told.error["message"]) == (8, True), (verb, told)
        assert "vmkeep catalog rebuild nas" in told.error["hint"]
    own = site.run("backup", "web1")
    assert (own.code, named in own.err, "rebuild nas" in own.err) == (8, True, True)
    listed = site.run("image", "list", "--json").json
    if what not in ("a JSON of nothing", "a reason with a flipped bit"):  # which a list does not read
        assert [one["state"] for one in listed] == ["damaged", "open"]
    for verb in (["image", "list"], ["vm", "list"], ["datastore", "list"], ["vm", "show", "db1"], ["image", "prune"]):
        told = site.run(*verb)
        assert told.code in (0, 3), (verb, told)
        assert "bug" not in told.err
    assert site.run("backup", "db1", "--json").json["type"] == "INCREMENT"
    rebuilt = site.run("catalog", "rebuild", "nas")
    assert rebuilt.code in (0, 3), rebuilt.err
    shown = site.run("image", "show", "1", "--json").json
    assert (shown["pinned"], shown["vm"], len(shown["increments"])) == (True, WEB.name, 2)
    assert site.run("restore", "1", "--verify-only").code == 0
    assert site.run("backup", "web1").code == 0


def test_what_a_flatten_has_left_that_is_no_source_stops_nothing(both):
    site = both
    change(site, f"INSERT INTO leftovers (vm_uuid, datastore, source) VALUES ('{DB.uuid}', 'nas', '../../../etc')")
    for verb in (["image", "prune"], ["backup", "db1"], ["catalog", "check"], ["catalog", "rebuild", "nas"]):
        told = site.run(*verb)
        assert told.code in (0, 3), (verb, told)
        assert "bug" not in told.err


def test_a_run_that_is_wrong_is_named(both):
    change(both, "UPDATE runs SET started = 'yesterday'")
    told = both.run("vm", "show", "web1", "--json")
    assert (told.code, told.error["message"].startswith("run '")) == (8, True)


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE images RENAME COLUMN vm_name TO vm_namf",
        "ALTER TABLE increments RENAME COLUMN pid TO pie",
    ],
    ids=["a flipped bit in the schema", "another"],
)
def test_a_catalog_that_is_wrong_as_a_whole_says_how_to_make_it_anew(both, statement):
    site = both
    change(site, statement)
    for verb in (["image", "show", "1"], ["image", "list"], ["backup", "web1"]):
        told = site.run(*verb, "--json")
        assert told.code == 8, told.err
        assert "vmkeep catalog rebuild DATASTORE" in told.error["hint"]
    for one in site.state.glob("catalog.sqlite*"):
        one.unlink()
    assert site.run("catalog", "rebuild", "nas").code == 0
    assert len(json.loads(site.run("image", "list", "--json").out)) == 2
