"""``vmkeep image verify``: all of it read back, and damage anywhere found."""

from __future__ import annotations

import json
import shutil

import pytest
from kept_in_files import WEB


def three_increments(site):
    sources = []
    for night in range(3):
        site.write(WEB, "vda", night * 100_000, f"night {night}".encode() * 10_000)
        sources.append(site.run("backup", "web1", "--json").json["source"])
    return sources


@pytest.fixture
def chain(site, once):
    """Three increments, and their sources."""
    return once(site, three_increments)


def test_a_whole_image_is_read(site, chain):
    made = site.run("image", "verify", "1", "--json").json
    assert (made["ok"], made["state"], made["sample"]) == (True, "open", 1)
    for one, source in zip(made["increments"], chain, strict=True):
        files = [file for file in (site.store / source).iterdir() if file.name not in (".labels", "manifest.json")]
        assert one == {
            "id": one["id"],
            "source": source,
            "problem": "",
            "read": sum(file.stat().st_size for file in files),
        }
    assert site.run("backup", "web1", "--json").json["increment"] == 3


def test_one_increment_is_what_it_builds_on(site, chain):
    shutil.rmtree(site.store / chain[2])
    made = site.run("image", "verify", "1", "--increment", "1", "--json").json
    assert [one["id"] for one in made["increments"]] == [0, 1]
    assert site.run("image", "verify", "1", "--increment", "7").code == 4


@pytest.mark.parametrize("name", ["disk.vda.qcow2", "disk.vdb.qcow2", "sums.vda", "vm.xml", "manifest.json"])
@pytest.mark.parametrize("at", [3, -7])
def test_a_byte_that_was_changed_is_found_and_the_next_backup_is_a_full(site, chain, name, at):
    path = site.store / chain[0 if name == "disk.vdb.qcow2" else 1] / name
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    told = site.run("image", "verify", "1", "--json")
    made = json.loads(told.out)
    assert (told.code, made["ok"], made["state"]) == (8, False, "damaged")
    wrong = [one["id"] for one in made["increments"] if one["problem"]]
    assert wrong[0] == (0 if name == "disk.vdb.qcow2" else 1)
    if name == "manifest.json":
        assert wrong == [1, 2], "what builds on it cannot be restored either"
    full = site.run("backup", "web1", "--json").json
    assert (full["type"], full["reason"]) == ("FULL", "image 1 is damaged")
    data[at] ^= 1
    path.write_bytes(data)
    assert site.run("image", "verify", "1", "--json").json["state"] == "closed", "it was put back"


def test_a_source_that_is_gone_and_one_that_was_exchanged(site, chain):
    (site.store / chain[1]).rename(site.folder / "there")
    told = json.loads(site.run("image", "verify", "1", "--json").out)
    assert ["is no longer in" in one["problem"] for one in told["increments"]] == [False, True, False]
    assert "increment 1, which it builds on" in told["increments"][2]["problem"]
    (site.store / chain[2]).rename(site.store / chain[1])
    (site.folder / "there").rename(site.store / chain[2])
    told = json.loads(site.run("image", "verify", "1", "--json").out)
    assert [bool(one["problem"]) for one in told["increments"]] == [False, True, True]


def test_a_sample_reads_a_part_and_does_not_clear_a_mark(site, chain):
    everything = site.run("image", "verify", "1", "--json").json
    part = site.run("image", "verify", "1", "--sample", "10", "--json").json
    assert part["sample"] == 0.1
    assert 0 < part["increments"][0]["read"] < everything["increments"][0]["read"] * 0.6
    (site.store / chain[2] / "vm.xml").rename(site.folder / "vm.xml")
    assert site.run("image", "verify", "1", "--sample", "10").code == 8
    (site.folder / "vm.xml").rename(site.store / chain[2] / "vm.xml")
    assert site.run("image", "verify", "1", "--sample", "10", "--json").json["state"] == "damaged"
    assert site.run("image", "verify", "1", "--sample", "101").code == 2


def test_the_table_for_people_and_a_datastore_that_is_away(site, chain):
    told = site.run("image", "verify", "1")
    assert told.code == 0
    assert [line.split()[0] for line in told.out.splitlines()[2:]] == ["0", "1", "2"]
    (site.store / chain[1] / "vm.xml").write_text("changed")
    told = site.run("image", "verify", "1")
    assert told.code == 8
    assert "image 1 is damaged: increments 1 cannot be restored" in told.err


def test_a_damaged_disk_harms_what_builds_on_it_and_no_other(site, chain):
    disk = site.store / chain[1] / "disk.vda.qcow2"
    data = bytearray(disk.read_bytes())
    data[-1] ^= 1
    disk.write_bytes(data)
    told = site.run("image", "verify", "1", "--json")
    problems = [one["problem"] for one in json.loads(told.out)["increments"]]
    assert (told.code, problems[0]) == (8, "")
    assert "disk vda: data cluster" in problems[1]
    assert problems[2] == "it builds on increment 1, of which disk vda cannot be restored"
    assert site.run("restore", "1", "--disk", "vda", "--to", str(site.folder / "vda")).code == 8
    assert site.run("restore", "1", "--disk", "vdb", "--to", str(site.folder / "vdb")).code == 0
