"""A catalog that is not what its datastore holds: an old state folder, a drill elsewhere, what others removed."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
from dataclasses import dataclass, field

import pytest
from kept_in_files import WEB

MACHINES = {"here": "1" * 32, "there": "2" * 32}


@dataclass
class Nights:
    """A VM's nights on a host: what its disk held at each point, whoever has taken that backup."""

    site: object
    truth: dict[str, bytes] = field(default_factory=dict)
    count: int = 0

    def night(self, site=None, code=0, *arguments):
        site = site or self.site
        self.count += 1
        site.write(WEB, "vda", 50_000 * (self.count % 20), b"night %03d " % self.count * 4000)
        told = site.run("backup", "web1", "--json", *arguments)
        assert told.code == code, told.err
        done = json.loads(told.out)
        self.truth[done["point"]] = bytes(site.guest(WEB).disks["vda"])
        return done

    def settings(self, **options):
        arguments = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)]
        assert self.site.run("vm", "updateconf", "web1", *arguments).code == 0

    def check(self, *sites):
        """Every increment that a catalog has restores to its truth, and every one in the datastore is in a catalog."""
        found = set()
        for site in sites or (self.site,):
            for image in site.run("image", "list", "--json").json:
                for one in site.run("image", "show", str(image["id"]), "--json").json["increments"]:
                    found.add(one["point"])
                    to = site.folder / f"to-{image['id']}-{one['id']}-{len(list(site.folder.iterdir()))}"
                    given = ("--increment", str(one["id"]), "--disk", "vda", "--to", str(to), "--json")
                    disk = site.run("restore", str(image["id"]), *given).json["disks"][0]["path"]
                    raw = to / "raw"
                    subprocess.run(["qemu-img", "convert", "-O", "raw", disk, raw], check=True)
                    assert raw.read_bytes() == self.truth[one["point"]], (image, one)
        assert found == points(self.site)


def points(site):
    return {json.loads(path.read_text())["point"] for path in site.store.glob("*/.labels")}


def ids(site, image=1):
    return [one["id"] for one in site.run("image", "show", str(image), "--json").json["increments"]]


def states(site):
    return {one["id"]: one["state"] for one in site.run("image", "list", "--json").json}


def sources(site, image=1):
    return [one["source"] for one in site.run("image", "show", str(image), "--json").json["increments"]]


@pytest.fixture
def nights(site):
    return Nights(site)


@pytest.fixture
def elsewhere(beside, monkeypatch):
    """Another host: it sees the same datastore and, to make it short, the same VM."""
    return beside


@dataclass
class Saved:
    """The state folder of one night, to be put back."""

    site: object

    @property
    def folder(self):
        return self.site.folder / "last night"

    def keep(self):
        shutil.copytree(self.site.state, self.folder)

    def put_back(self):
        shutil.rmtree(self.site.state)
        self.folder.rename(self.site.state)


@pytest.fixture
def saved(site):
    return Saved(site)


# A drill on another host


def test_a_second_disaster_finds_what_was_backed_up_since_the_drill(site, nights, elsewhere):
    for _ in range(2):
        nights.night()
    assert len(elsewhere.run("catalog", "rebuild", "nas", "--json").json["added"]) == 1
    for _ in range(2):
        nights.night()
    told = elsewhere.run("restore", "1", "--to", str(elsewhere.folder / "to"))
    assert told.code == 0
    assert (
        "datastore nas holds newer backups (increments 2, 3) of image 1, which this catalog does not know" in told.err
    )
    assert "vmkeep catalog rebuild nas" in told.err
    before = (elsewhere.state / "catalog.sqlite").read_bytes()
    planned = elsewhere.run("catalog", "rebuild", "nas", "--dry-run", "--json").json
    assert [(one["id"], one["added"], one["merged"]) for one in planned["changed"]] == [(1, [2, 3], [])]
    assert (elsewhere.state / "catalog.sqlite").read_bytes() == before
    assert ids(elsewhere) == [0, 1]
    told = elsewhere.run("catalog", "rebuild", "nas")
    assert "image 1, VM web1: increments 2, 3 added" in told.out
    (kept,) = elsewhere.state.glob("catalog.before-rebuild-*.sqlite")
    assert kept.stat().st_mode & 0o777 == 0o600
    with sqlite3.connect(kept) as catalog:
        assert catalog.execute("SELECT count(*) FROM increments").fetchone() == (2,)
    assert ids(elsewhere) == [0, 1, 2, 3]
    nights.check(elsewhere)
    again = elsewhere.run("catalog", "rebuild", "nas", "--json").json
    assert (again["added"], again["changed"], again["kept"]) == ([], [], None)
    assert "warning" not in elsewhere.run("restore", "1", "--verify-only").err


@pytest.mark.parametrize("flattens", ["once", "often"])
def test_a_second_disaster_where_the_first_host_flattens(site, nights, elsewhere, flattens):
    nights.settings(keep_last="2")
    for _ in range(2):
        nights.night()
    elsewhere.run("catalog", "rebuild", "nas")
    for _ in range(1 if flattens == "once" else 4):
        nights.night()
    told = elsewhere.run("restore", "1", "--to", str(elsewhere.folder / "to"))
    assert told.code == 4
    assert "vmkeep catalog rebuild nas" in told.err
    verified = elsewhere.run("image", "verify", "1")
    assert (verified.code, "superseded" in verified.out, "damaged:" in verified.err) == (3, True, False)
    assert states(elsewhere) == {1: "closed"}
    done = elsewhere.run("catalog", "rebuild", "nas", "--json").json
    last = nights.count - 1
    assert [(one["added"], one["merged"], one["into"], one["increments"]) for one in done["changed"]] == [
        ([2], [0, 1], 1, [1, 2]) if flattens == "once" else ([last - 1, last], [0, 1], last - 1, [last - 1, last])
    ]
    nights.check(elsewhere)
    assert elsewhere.run("image", "verify", "1").code == 0


# A state folder of last night


def test_last_nights_state_folder_with_a_chain_that_went_on(site, nights, saved):
    for _ in range(2):
        nights.night()
    saved.keep()
    nights.night()
    saved.put_back()
    done = nights.night(code=3)
    assert (done["type"], done["image"]) == ("FULL", 2)
    assert "holds newer backups (increment 2) of image 1" in done["reason"]
    assert "vmkeep catalog rebuild nas" in done["warnings"][0]
    site.run("catalog", "rebuild", "nas")
    assert (ids(site), states(site)) == ([0, 1, 2], {1: "closed", 2: "open"})
    assert nights.night()["type"] == "INCREMENT"
    nights.check()


def test_last_nights_state_folder_after_a_flatten(site, nights, saved):
    nights.settings(keep_last="3")
    for _ in range(3):
        nights.night()
    saved.keep()
    nights.night()
    saved.put_back()
    good = points(site)
    assert site.run("restore", "1", "--to", str(site.folder / "to")).code == 4
    verified = site.run("image", "verify", "1")
    assert (verified.code, states(site)) == (3, {1: "open"})
    deleted = site.run("image", "delete", "1", "--yes")
    assert (deleted.code, "vmkeep catalog rebuild nas" in deleted.err) == (9, True)
    assert points(site) == good
    told = site.run("catalog", "rebuild", "nas", "--json").json
    assert [(one["added"], one["merged"], one["into"]) for one in told["changed"]] == [([3], [0, 1], 1)]
    assert states(site) == {1: "closed"}
    assert site.run("catalog", "check").code == 0
    nights.check()
    done = nights.night()
    assert (done["type"], done["image"], "rebuild" in done["reason"]) == ("FULL", 2, True)
    nights.check()
    assert site.run("image", "delete", "1", "--yes").code == 0
    nights.check()


def test_last_nights_state_folder_and_a_backup_before_anybody_rebuilds(site, nights, saved):
    nights.settings(keep_last="2")
    for _ in range(3):
        nights.night()
    saved.keep()
    nights.night()
    saved.put_back()
    done = nights.night(code=3)
    assert (done["type"], done["image"]) == ("FULL", 2)
    assert "holds a later full" in done["reason"]
    for _ in range(2):
        assert nights.night(code=3)["type"] == "INCREMENT"
    site.run("catalog", "rebuild", "nas")
    nights.check()
    assert nights.night()["type"] == "INCREMENT"


def test_a_check_tells_what_was_merged_from_what_is_missing(site, nights, elsewhere):
    """The other host's catalog knows of the images by a rebuild; their owner lives on, and merges them."""
    for _ in range(2):
        nights.night()
    elsewhere.run("catalog", "rebuild", "nas")
    assert elsewhere.run("catalog", "check").code == 0
    nights.settings(keep_last="1")
    nights.night()
    told = elsewhere.run("catalog", "check")
    assert told.code == 3
    assert [line.split(" ")[0] for line in told.out.splitlines()] == ["superseded", "superseded", "unused"]
    assert "vmkeep catalog rebuild nas" in told.err
    found = json.loads(elsewhere.run("catalog", "check", "--json").out)
    assert (found["missing"], [one["what"] for one in found["superseded"]]) == (
        [],
        ["increment 0 of image 1, VM web1", "increment 1 of image 1, VM web1"],
    )
    elsewhere.run("catalog", "rebuild", "nas")
    assert elsewhere.run("catalog", "check").code == 0


def test_a_check_goes_by_the_sizes_that_a_store_lists(site, nights):
    (site.store / "sizes").touch()
    for _ in range(2):
        nights.night()
    (site.store / sources(site)[0] / "disk.vda.qcow2").unlink()
    told = site.run("catalog", "check")
    assert told.code == 8
    assert "a part of increment 0 of image 1" in told.out


def test_an_image_that_was_merged_into_what_the_catalog_does_not_know_is_not_deleted(site, nights, saved):
    """Its own sources are gone already, and what was to go lies in the full that they went into."""
    nights.settings(keep_last="2")
    for _ in range(2):
        nights.night()
    saved.keep()
    nights.night()
    saved.put_back()
    refused = site.run("image", "delete", "1", "--yes")
    assert refused.code == 9
    assert "holds a later full that increments 0, 1 went into" in refused.err
    site.run("catalog", "rebuild", "nas")
    assert site.run("image", "delete", "1", "--yes").code == 0
    assert points(site) == set()


def test_a_catalog_that_has_nothing_of_a_vm_whose_backups_are_there(site, nights):
    """Of an older state folder, or a catalog that was removed."""
    for _ in range(2):
        nights.night()
    (site.state / "catalog.sqlite").unlink()
    done = nights.night(code=3)
    assert (done["type"], done["image"]) == ("FULL", 1)
    assert "holds 2 backups of this VM" in done["reason"]
    assert "vmkeep catalog rebuild nas" in done["warnings"][0]
    assert nights.night()["type"] == "INCREMENT"
    site.run("catalog", "rebuild", "nas")
    nights.check()


def test_a_chain_with_two_ends_is_two_images_and_neither_takes_from_the_other(site, nights, saved):
    for _ in range(2):
        nights.night()
    saved.keep()
    nights.night()
    hidden = site.folder / "hidden"
    newest = sources(site)[2]
    (site.store / newest).rename(hidden)  # a store whose listing lags behind
    saved.put_back()
    assert (nights.night()["type"], ids(site)) == ("INCREMENT", [0, 1, 2])
    hidden.rename(site.store / newest)
    nights.night()
    done = site.run("catalog", "rebuild", "nas", "--json").json
    assert [one["increments"] for one in done["added"]] == [[0, 1, 2]]
    assert ids(site) == [0, 1, 2, 3]
    assert states(site) == {1: "open", 2: "closed"}
    nights.check()
    assert site.run("catalog", "rebuild", "nas", "--json").json["changed"] == []
    # One image goes, what the other needs of it stays.
    nights.settings(keep_last="2")
    nights.night()
    assert ids(site) == [3, 4]
    nights.check()
    assert site.run("image", "delete", "2", "--yes").code == 0
    nights.night()
    nights.check()


def test_a_flatten_spares_what_only_the_datastore_knows_to_be_needed(site, nights, elsewhere, saved):
    """Another end of the chain, that this catalog does not know."""
    for _ in range(2):
        nights.night()
    saved.keep()
    nights.night()
    newest = sources(site)[2]
    hidden = site.folder / "hidden"
    (site.store / newest).rename(hidden)
    saved.put_back()
    nights.night()
    hidden.rename(site.store / newest)
    nights.settings(keep_last="1")
    done = nights.night(code=3)
    assert any("build on them" in one for one in done["warnings"])
    elsewhere.run("catalog", "rebuild", "nas")
    assert sorted(ids(elsewhere, image["id"])[-1] for image in elsewhere.run("image", "list", "--json").json) == [2, 3]
    nights.check(elsewhere)


@pytest.mark.parametrize("merges", ["once", "often"])
def test_what_is_lost_at_one_end_of_a_chain_is_not_taken_for_merged_at_the_other(site, nights, saved, merges):
    for _ in range(2):
        nights.night()
    saved.keep()
    nights.night()
    own = site.folder / "own end"
    shutil.copytree(site.state, own)
    shutil.rmtree(site.store / sources(site)[2])
    saved.put_back()
    nights.settings(keep_last="2")
    for _ in range(2 if merges == "once" else 3):
        nights.night()
    assert ids(site) == ([2, 3] if merges == "once" else [3, 4])
    shutil.rmtree(site.state)
    own.rename(site.state)
    assert site.run("image", "verify", "1").code == 8
    nights.night(code=3)
    lost = [one["id"] for one in site.run("image", "show", "1", "--json").json["increments"] if one["lost"]]
    assert (lost, states(site)[1]) == ([2], "damaged")
    assert site.run("catalog", "rebuild", "nas").code == 0
    assert (ids(site), states(site)[1]) == ([0, 1, 2], "damaged"), "the other end is an image of its own"


def test_a_planted_full_takes_the_place_of_nothing_that_is_there(site, nights, elsewhere):
    for _ in range(3):
        nights.night()
    elsewhere.run("catalog", "rebuild", "nas")
    last = sources(site)[2]
    known = {one["point"]: one["source"] for one in site.run("image", "show", "1", "--json").json["increments"]}
    planted = site.store / ("b" * 32)
    shutil.copytree(site.store / sources(site)[0], planted)
    path = planted / "manifest.json"
    change = {"number": 9, "point": "9" * 32, "replaces": [*known, "9" * 32]}
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    done = elsewhere.run("catalog", "rebuild", "nas", "--json").json
    assert (done["changed"], [one["increments"] for one in done["added"]]) == ([], [[9]])
    assert (ids(elsewhere), sources(elsewhere)[2]) == ([0, 1, 2], last)


def test_a_rebuild_in_the_middle_of_anothers_flatten_and_after_it(site, nights, elsewhere):
    for _ in range(3):
        nights.night()
    elsewhere.run("catalog", "rebuild", "nas")
    (site.store / "fail-delete").touch()
    nights.settings(keep_last="2")
    nights.night(code=3)
    done = elsewhere.run("catalog", "rebuild", "nas", "--json").json
    assert [(one["added"], one["merged"]) for one in done["changed"]] == [([3], [])], "all that was merged is there"
    (site.store / "fail-delete").unlink()
    shutil.rmtree(site.store / sources(elsewhere)[2])  # newest first: in the middle of the delete
    assert elsewhere.run("restore", "1", "--verify-only").code == 4
    done = elsewhere.run("catalog", "rebuild", "nas", "--json").json
    assert [(one["added"], one["merged"], one["into"]) for one in done["changed"]] == [([], [0, 1, 2], 2)]
    assert ({one["kind"] for one in done["remarks"]}, done["added"]) == ({"unused"}, [])
    assert site.run("image", "prune").code == 0
    done = elsewhere.run("catalog", "rebuild", "nas", "--json").json
    assert (done["changed"], done["remarks"]) == ([], [])
    assert (ids(elsewhere), states(elsewhere)) == ([2, 3], {1: "closed"})
    nights.check(elsewhere)


def test_a_rebuild_does_not_touch_what_a_backup_records_meanwhile(site, nights, saved):
    for _ in range(2):
        nights.night()
    saved.keep()
    nights.night()
    saved.put_back()
    (site.store / "wait").touch()
    child = site.start("backup", "web1")
    site.until((site.store / "waits").exists, "the backup")
    told = site.run("catalog", "rebuild", "nas")
    assert (told.code, "already running" in told.err, ids(site)) == (3, True, [0, 1])
    nights.truth[""] = bytes(site.guest(WEB).disks["vda"])
    (site.store / "wait").unlink()
    child.communicate(timeout=60)
    assert child.returncode == 3
    assert site.run("catalog", "rebuild", "nas").code == 0
    assert (ids(site), states(site)) == ([0, 1, 2], {1: "closed", 2: "open"})


# What others removed, or changed


@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_others_removed_is_marked_at_once(site, nights, which):
    for _ in range(3):
        nights.night()
    shutil.rmtree(site.store / sources(site)[which])
    done = nights.night(code=3)
    assert (done["type"], done["image"], done["reason"]) == ("FULL", 2, done["warnings"][0])
    assert f"increment {which} of image 1" in done["reason"]
    assert "is no longer in datastore nas" in done["reason"]
    assert states(site) == {1: "damaged", 2: "open"}
    lost = [one["id"] for one in site.run("image", "show", "1", "--json").json["increments"] if one["lost"]]
    assert lost == [which]
    assert nights.night()["type"] == "INCREMENT"
    for number in range(3):
        told = site.run("restore", "1", "--increment", str(number), "--to", str(site.folder / f"old{number}"))
        assert told.code == (0 if number < which else 4), told.err


def test_what_is_lost_does_not_count_for_keep_last(site, nights):
    nights.settings(mode="FULL", keep_last="2")
    for _ in range(2):
        nights.night()
    shutil.rmtree(site.store / sources(site, 1)[0])
    nights.night(code=3)
    nights.settings(keep_last="3")
    assert "image 1: stays: it is damaged" in nights.night(code=3)["warnings"][0]
    assert [number for number, state in states(site).items() if state != "damaged"] == [2, 3, 4]


def test_a_part_of_a_backup_that_is_gone_is_noticed_where_the_listing_tells_sizes(site, nights):
    (site.store / "sizes").touch()
    for _ in range(2):
        assert nights.night()["warnings"] == []
    (site.store / sources(site)[0] / "disk.vda.qcow2").unlink()
    done = nights.night(code=3)
    assert (done["type"], "not whole any more" in done["reason"]) == ("FULL", True)
    assert states(site) == {1: "damaged", 2: "open"}
    given = ("--increment", "0", "--disk", "vdb", "--to", str(site.folder / "other"))
    assert site.run("restore", "1", *given).code == 0, "the other disk is there"


def test_a_datastore_that_was_put_back_from_a_copy_of_before_a_flatten(site, nights, tmp_path):
    """A snapshot of the NAS: the same identity, and increments that the catalog has let go of since."""
    nights.settings(keep_last=2)
    nights.night()
    nights.night()
    shutil.copytree(site.store, tmp_path / "copy")
    nights.night()
    shutil.rmtree(site.store)
    (tmp_path / "copy").rename(site.store)
    for verb, code in ((("restore", "1", "--verify-only"), 4), (("image", "verify", "1"), 8), (("backup", "web1"), 3)):
        told = site.run(*verb)
        assert told.code == code, told.err
        assert "other backups (increments 0, 1) of image 1" in told.err
        assert "vmkeep catalog rebuild nas" in told.err
    assert site.run("catalog", "rebuild", "nas").code == 0
    assert site.run("backup", "web1").code == 0, "they are known now"
    assert site.run("restore", "1", "--increment", "1", "--verify-only").code == 0


def test_what_comes_back_counts_again(site, nights):
    for _ in range(2):
        nights.night()
    first = sources(site)[0]
    (site.store / first).rename(site.folder / "away")
    nights.night(code=3)
    (site.folder / "away").rename(site.store / first)
    nights.night()
    assert states(site) == {1: "closed", 2: "open"}
    nights.check()


@pytest.mark.parametrize("verb", ["backup", "restore", "verify", "rebuild", "delete", "flatten"])
def test_a_source_that_has_another_token_is_found_by_its_point(site, nights, verb):
    for _ in range(3):
        nights.night()
    renamed = []
    for source in sources(site)[:2]:
        renamed.append(f"{len(renamed)}" * 32)
        (site.store / source).rename(site.store / renamed[-1])
    if verb == "delete":
        assert site.run("image", "delete", "1", "--yes").code == 0
        assert points(site) == set()
        return
    if verb == "backup":
        assert (nights.night()["type"], ids(site)) == ("INCREMENT", [0, 1, 2, 3])
    elif verb == "flatten":
        assert site.run("image", "flatten", "1", "--to", "1").code == 0
        assert ids(site) == [1, 2]
        nights.truth = {point: truth for point, truth in nights.truth.items() if point in points(site)}
    else:
        argument = {"restore": "restore 1 --verify-only", "verify": "image verify 1", "rebuild": "catalog rebuild nas"}
        assert site.run(*argument[verb].split()).code == 0
    assert states(site) == {1: "open"}
    if verb != "flatten":
        assert sources(site)[:2] == renamed
    nights.check()


def test_another_backup_with_the_point_of_one_is_not_taken_for_it(site, nights):
    for _ in range(2):
        nights.night()
    first = sources(site)[0]
    (site.store / first).rename(site.store / ("a" * 32))
    path = site.store / ("a" * 32) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"consistency": "off"}))
    assert nights.night(code=3)["type"] == "FULL"
    assert sources(site)[0] == first


def test_where_all_was_removed_it_is_said_in_the_same_night(site, nights):
    for _ in range(2):
        nights.night()
    for source in sources(site):
        (site.store / source).rename(site.folder / source)
    done = nights.night(code=3)
    assert (done["type"], "increment 0 of image 1" in done["reason"]) == ("FULL", True)
    assert done["warnings"] == [f"{done['reason']} (1 more)"]
    assert states(site) == {1: "damaged", 2: "open"}
    assert all(one["lost"] for one in site.run("image", "show", "1", "--json").json["increments"])
    for source in sources(site):
        (site.folder / source).rename(site.store / source)
    assert nights.night()["type"] == "INCREMENT"
    assert states(site) == {1: "closed", 2: "open"}
    nights.check()


def test_an_empty_listing_loses_nothing_that_can_be_read(site, nights):
    for _ in range(2):
        nights.night()
    (site.store / "lists-nothing").touch()
    done = nights.night()
    assert (done["type"], states(site)) == ("INCREMENT", {1: "open"})
    assert [one["lost"] for one in site.run("image", "show", "1", "--json").json["increments"]] == [None] * 3


def test_an_empty_folder_in_its_place_loses_nothing(site, nights):
    for _ in range(2):
        nights.night()
    site.store.rename(site.folder / "away")
    site.store.mkdir()
    assert site.run("backup", "web1").code == 5
    assert site.run("restore", "1", "--verify-only").code == 5
    site.store.rmdir()
    (site.folder / "away").rename(site.store)
    assert states(site) == {1: "open"}
    assert [one["lost"] for one in site.run("image", "show", "1", "--json").json["increments"]] == [None] * 2


def test_what_a_failed_run_has_left_is_no_end_of_the_chain(site, nights):
    """Stored, and the datastore was away before it could say so: nobody was told that it is done."""
    nights.night()
    (site.store / "away-once-stored").touch()
    assert site.run("backup", "web1").code == 5
    (site.store / "away-once-stored").unlink()
    assert len(points(site)) == 2
    done = nights.night()
    assert (done["type"], done["increment"]) == ("INCREMENT", 1)
    done = site.run("catalog", "rebuild", "nas", "--json").json
    assert (done["changed"], done["added"]) == ([], [])
    assert [one["why"] for one in done["remarks"]] == ["a run that failed has stored it"]
    assert site.run("image", "delete", "1", "--yes").code == 0


def test_what_a_killed_run_has_stored_and_nothing_can_record_is_no_end_of_the_chain(site, nights):
    nights.night()
    (site.store / "die").touch()
    site.process("backup", "web1")
    (site.store / "die").unlink()
    (noted,) = (site.state / "runs").glob("*/prepared.json")
    noted.write_text("{}")
    done = nights.night()
    assert (done["type"], done["increment"]) == ("INCREMENT", 1)
    done = site.run("catalog", "rebuild", "nas", "--json").json
    assert (done["changed"], done["added"], len(done["remarks"])) == ([], [], 1)


def test_a_backup_after_a_killed_run_is_none_of_that_run(site, nights, saved):
    """A state folder of last night knows the run that was killed, and not the backup an hour after it."""
    nights.night()
    (site.store / "die").touch()
    site.process("backup", "web1")
    (site.store / "die").unlink()
    (killed,) = {path.parent for path in site.store.glob("*/.labels")} - {site.store / sources(site)[0]}
    shutil.rmtree(killed)
    assert site.run("recover", "web1").code == 0
    saved.keep()
    assert nights.night(None, 0, "--reset")["image"] == 2
    saved.put_back()
    done = site.run("catalog", "rebuild", "nas", "--json").json
    assert (len(done["added"]), done["remarks"]) == (1, [])


def test_a_state_folder_that_was_copied_in_the_middle_of_a_backup(site, nights, saved):
    """That backup was done, and others build on it; the copy calls it killed."""
    nights.night()
    (site.store / "die").touch()
    site.process("backup", "web1")
    (site.store / "die").unlink()
    saved.keep()
    (noted,) = (saved.folder / "runs").glob("*/prepared.json")
    noted.unlink()
    for number in (2, 3):
        assert nights.night()["increment"] == number
    saved.put_back()
    refused = site.run("image", "delete", "1", "--yes")
    assert (refused.code, len(points(site))) == (9, 4)
    done = nights.night(code=3)
    assert done["type"] == "FULL"
    assert "newer backups (increments 1 to 3) of image 1" in done["reason"]
    done = site.run("catalog", "rebuild", "nas", "--json").json
    assert [one["added"] for one in done["changed"]] == [[1, 2, 3]]
    assert done["remarks"] == []
    assert site.run("restore", "1", "--increment", "3", "--verify-only").code == 0
    assert nights.night()["type"] == "INCREMENT"


# Two installations


def test_two_installations_in_turns_of_which_one_knows_the_others_images(site, nights, elsewhere):
    for _ in range(2):
        nights.night()
    elsewhere.run("catalog", "rebuild", "nas")
    nights.settings(keep_last="2")
    for _ in range(4):
        for one in (site, elsewhere):
            done = nights.night(one)
            assert done["warnings"] == []
    for one in (site, elsewhere):
        assert nights.night(one)["type"] == "INCREMENT"
        own = {image["id"]: image["state"] for image in one.run("image", "list", "--json").json}
        assert "open" in own.values()
    elsewhere.run("catalog", "rebuild", "nas")
    nights.check(elsewhere)
    for image in elsewhere.run("image", "list", "--json").json:
        if image["state"] == "closed":
            told = elsewhere.run("image", "delete", str(image["id"]), "--yes")
            assert (told.code, "another installation's" in told.err) == (9, True)
    nights.check(elsewhere)
