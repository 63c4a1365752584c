"""``vmkeep image``: finding, showing, deleting."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest
from kept_in_files import DB, WEB, load, save


@pytest.fixture
def two(site):
    """Two images: one closed with two increments, one open."""
    return [site.run("backup", "web1", *more, "--json").json for more in ((), (), ("--reset",))]


def test_the_table_of_increments(site, two):
    told = site.run("image", "show", "1")
    lines = [line.split() for line in told.out.splitlines() if line.strip()]
    assert lines[0][:2] == ["Image", "1"]
    assert lines[1][:3] == ["VM", "web1", f"({WEB.uuid})"]
    assert lines[2][:6] == ["ID", "PID", "T", "SIZE", "DATE", "SOURCE"]
    assert lines[4][:3] == ["0", "-1", "F"]
    assert lines[5][:3] == ["1", "0", "I"]
    assert two[1]["source"][:8] in lines[5]


def test_a_disk_that_is_whole_within_an_increment_says_why(site):
    site.run("backup", "web1")
    guests = load(site.guests)
    next(guest for guest in guests if guest.vm == WEB).disks["vdz"] = bytearray(1 << 16)
    save(site.guests, guests)
    told = site.run("backup", "web1")
    assert "  disk vdz whole: added since the last backup\n" in told.out
    assert "disk vdz: added since the last backup" in site.run("image", "show", "1").out
    increment = site.run("image", "show", "1", "--json").json["increments"][1]
    assert increment["type"] == "I"
    assert {disk["id"]: (disk["whole"], disk["reason"]) for disk in increment["disks"]} == {
        "vda": (False, ""),
        "vdb": (False, ""),
        "vdz": (True, "added since the last backup"),
    }


def test_the_points_that_next_increments_may_build_on_are_kept(site):
    site.configure(extra=site.second_store())
    for store in ("nas", "nas", "other", "nas", "other"):
        site.run("backup", "web1", "-d", store)
    chains = [site.run("image", "show", number, "--json").json["increments"] for number in ("1", "2")]
    points = [[increment["point"] for increment in chain] for chain in chains]
    assert set(site.guest(WEB).checkpoints) == {*points[0][-2:], *points[1][-2:]}
    site.run("backup", "web1", "-d", "nas", "--reset")
    newest = site.run("image", "show", "3", "--json").json["increments"][0]["point"]
    assert set(site.guest(WEB).checkpoints) == {newest, *points[1][-2:]}


def test_an_id_is_a_number_a_uuid_or_a_unique_prefix(site, two):
    uuid = two[2]["image_uuid"]
    dashed = "-".join((uuid[:8], uuid[8:12], uuid[12:16], uuid[16:20], uuid[20:]))
    for reference in ("2", uuid, dashed.upper(), uuid[:10]):
        assert site.run("image", "show", reference, "--json").json["id"] == 2
    for reference in ("3", "nonsense", "", "f" * 32, "99999999999999999999"):
        told = site.run("image", "show", reference)
        assert (told.code, "The newest are: 2, 1." in told.err) == (4, True)


def test_the_list_can_be_limited_to_a_vm(site, two):
    site.run("backup", "db1")
    assert [one["id"] for one in site.run("image", "list", "--json").json] == [1, 2, 3]
    assert [one["id"] for one in site.run("image", "list", "--vm", "db1", "--json").json] == [3]
    assert [one["id"] for one in site.run("image", "list", "--vm", WEB.uuid, "--json").json] == [1, 2]


def test_delete_goes_newest_first_and_numbers_are_never_reused(site, two):
    site.run("image", "delete", "2", "--yes")
    told = site.run("image", "delete", "1", "--yes", "--json")
    expected = [two[1]["source"], two[0]["source"]]
    assert told.json == {"id": 1, "image_uuid": two[0]["image_uuid"], "deleted": expected}
    assert (site.store / "deleted").read_text().split() == [two[2]["source"], *expected]
    assert site.run("image", "list", "--json").json == []
    assert site.run("backup", "web1", "--json").json["image"] == 3


def test_delete_asks_and_off_a_terminal_refuses(site, two):
    told = site.process("image", "delete", "1")
    assert (told.code, told.err.splitlines()[1]) == (2, "  Say --yes.")
    assert len(site.run("image", "list", "--json").json) == 2


def test_a_delete_that_fails_keeps_the_records_and_can_be_repeated(site, two):
    (site.store / "fail-delete").touch()
    assert site.run("image", "delete", "2", "--yes").code == 5
    shown = site.run("image", "show", "2", "--json").json
    assert (shown["state"], len(shown["increments"])) == ("closed", 1)
    (site.store / "fail-delete").unlink()
    assert site.run("backup", "web1", "--json").json["image"] == 3, "nothing is added to what is half deleted"
    assert site.run("image", "delete", "2", "--yes").code == 0
    assert site.run("image", "show", "2").code == 4


def test_the_image_that_a_backup_adds_to_cannot_be_deleted(site, two):
    (site.store / "wait").touch()
    child = site.start("backup", "web1")
    site.until((site.store / "waits").exists, "the backup")
    assert site.run("image", "delete", "2", "--yes").code == 10
    assert site.run("image", "delete", "1", "--yes").code == 0
    (site.store / "wait").unlink()
    child.communicate(timeout=60)
    assert child.returncode == 0


def test_digits_alone_are_a_number_and_never_the_beginning_of_a_uuid(site):
    for _ in range(2):
        assert site.run("backup", "web1", "--reset").code == 0
    with closing(sqlite3.connect(site.state / "catalog.sqlite")) as connection:
        connection.execute("UPDATE images SET uuid = '47110000471100004711000047110000' WHERE number = 2")
        connection.execute("UPDATE images SET uuid = '4711abcd471100004711000047110000' WHERE number = 1")
        connection.commit()
    for wrong in ("4711", "47110000", "0002", "02", "4711-", "47-110000", "\u0664\u0667\u0661\u0661", "2 ", "+2"):
        told = site.run("image", "delete", wrong, "--yes")
        assert told.code == 4, (wrong, told)
    assert "the UUID of image 2 begins so" in site.run("image", "show", "471100").err.replace("The", "the")
    assert site.run("image", "show", "2", "--json").json["id"] == 2
    for uuid in ("47110000471100004711000047110000", "47110000-4711-0000-4711-000047110000"):
        assert site.run("image", "show", uuid, "--json").json["id"] == 2
    for beginning in ("4711a", "4711ABCD", "4711abcd-47"):
        assert site.run("image", "show", beginning, "--json").json["id"] == 1
    assert site.run("image", "show", "47110000-47", "--json").json["id"] == 2, "a dash in its place is no number's"


@pytest.mark.parametrize(
    ("command", "near"),
    [
        (("image", "list", "--vm", "wbe1"), "web1"),
        (("image", "prune", "wbe1"), "web1"),
        (("backup", "wbe1"), "web1"),
        (("backup", "web1", "-d", "nsa"), "nas"),
        (("backup", "web1", "-d", "nsa", "--dry-run"), "nas"),
        (("recover", "wbe1"), "web1"),
        (("cancel", "wbe1"), "web1"),
        (("vm", "show", "wbe1"), "web1"),
        (("vm", "updateconf", "wbe1", "--mode", "FULL"), "web1"),
        (("vm", "updateconf", "web1", "--exclude-disks", "vdc"), "vda"),
        (("vm", "updateconf", "web1", "--volatile-disks", "vdc"), "vda"),
        (("vm", "forget", "wbe1"), "web1"),
        (("vm", "compare", "wbe1"), "web1"),
        (("vm", "compare", "web1", "-d", "nsa"), "nas"),
        (("vm", "compare", "web1", "--disk", "vdc"), "vda"),
        (("image", "show", "7"), "1"),
        (("image", "verify", "1", "--increment", "7"), "0"),
        (("image", "flatten", "1", "--to", "7"), "0"),
        (("image", "pin", "7"), "1"),
        (("restore", "7"), "1"),
        (("restore", "1", "--increment", "7"), "0"),
        (("restore", "1", "--disk", "vdc"), "vda"),
        (("restore", "1", "--disk", "vdc", "--verify-only"), "vda"),
        (("restore", "1", "--increment", "7", "--verify-only"), "0"),
        (("restore", "1", "--disk", "vdc", "--in-place"), "vda"),
        (("restore", "1", "--pool", "default"), "none"),
        (("datastore", "show", "nsa"), "nas"),
        (("datastore", "check", "nsa"), "nas"),
        (("datastore", "maintain", "nsa"), "nas"),
        (("datastore", "adopt", "nsa"), "nas"),
        (("catalog", "check", "nsa"), "nas"),
        (("catalog", "rebuild", "nsa"), "nas"),
        (("catalog", "take-over", "nsa", "--from", "abcd"), "nas"),
        (("catalog", "take-over", "nas", "--from", "abcd"), "rebuild"),
    ],
)
def test_a_name_that_nothing_has_is_not_found_and_the_nearest_is_named(site, once, command, near):
    once(site, backed_up)
    told = site.run(*command)
    assert told.code == 4, told
    assert near in told.err, told


def backed_up(site):
    assert site.run("backup", "web1").code == 0


def test_a_vm_without_a_backup_has_an_empty_list(site):
    assert site.run("image", "list", "--vm", "db1", "--json").json == []
    assert site.run("image", "list", "--vm", DB.uuid.upper(), "--json").json == []
    assert site.run("image", "list", "--vm", "").code == 4


def test_a_catalog_without_images_says_how_it_gets_those_of_a_datastore(site):
    told = site.run("restore", "1", "--verify-only")
    assert (told.code, "vmkeep catalog rebuild DATASTORE" in told.err) == (4, True), told
