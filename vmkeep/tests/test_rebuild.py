"""``vmkeep catalog``: made anew from the datastores, and held against them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from kept_in_files import WEB

from vmkeep import flatten, rebuild
from vmkeep.catalog import flattens, images
from vmkeep.config import load
from vmkeep.workplace import Workplace


def raw(path):
    out = Path(path).with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(path), str(out)], check=True)
    return out.read_bytes()


def four_nights(site):
    truths = {}
    for night in range(4):
        site.write(WEB, "vda", night * 100_000, f"night {night}".encode() * 10_000)
        site.run("backup", "web1")
        truths[1, night] = bytes(site.guest(WEB).disks["vda"])
    site.run("backup", "db1")
    site.write(WEB, "vda", 1 << 20, b"a new image")
    site.run("backup", "web1", "--reset")
    truths[3, 0] = bytes(site.guest(WEB).disks["vda"])
    return truths


@pytest.fixture
def nights(site, once):
    """Four increments of web1 in image 1, db1 in image 2, a later full of web1; what web1's disk held at each."""
    return once(site, four_nights)


def shown(site):
    """Every image with its increments, but for what a datastore does not hold."""
    found = []
    for one in site.run("image", "list", "--json").json:
        image = site.run("image", "show", str(one["id"]), "--json").json
        del image["state"]
        found.append(image)
    return found


def lose(site):
    shutil.rmtree(site.state)


def sources(site, image=1):
    return [one["source"] for one in site.run("image", "show", str(image), "--json").json["increments"]]


def restored(site, image, increment):
    to = site.folder / f"to-{image}-{increment}"
    told = site.run("restore", str(image), "--increment", str(increment), "--disk", "vda", "--to", str(to), "--json")
    return raw(told.json["disks"][0]["path"])


def test_a_lost_catalog_comes_back_from_the_datastore(site, nights):
    before = shown(site)
    lose(site)
    made = site.run("catalog", "rebuild", "nas", "--json").json
    assert [(one["id"], one["vm"], one["increments"]) for one in made["added"]] == [
        (1, "web1", [0, 1, 2, 3]),
        (2, "db1", [0]),
        (3, "web1", [0]),
    ]
    assert (made["remarks"], made["known"], made["busy"]) == ([], 0, [])
    assert shown(site) == before
    for (image, increment), truth in nights.items():
        assert restored(site, image, increment) == truth
    assert {one["state"] for one in site.run("image", "list", "--json").json} == {"closed"}
    again = site.run("catalog", "rebuild", "nas", "--json").json
    assert (again["added"], again["known"], again["remarks"]) == ([], 6, [])
    assert shown(site) == before, "a second time there is nothing to do"


def test_the_next_backup_after_a_rebuild_begins_an_image_and_says_why(site, nights):
    lose(site)
    site.run("catalog", "rebuild", "nas")
    next_one = site.run("backup", "web1", "--json").json
    assert (next_one["type"], next_one["image"]) == ("FULL", 4)
    assert next_one["reason"].startswith("first backup by this installation: the backups of this VM")
    assert site.run("backup", "web1", "--json").json["image"] == 4


def test_images_that_are_found_later_do_not_come_before_the_open_one(site, nights):
    (site.state).rename(site.folder / "lost")
    site.run("backup", "web1")
    site.run("catalog", "rebuild", "nas")
    assert [one["increments"][0]["id"] for one in shown(site)] == [0] * 4
    second = site.run("backup", "web1", "--json").json
    assert (second["type"], second["image"]) == ("INCREMENT", 1)
    gone = json.loads((site.folder / "lost" / "installation").read_text())["installation"]
    assert site.run("catalog", "take-over", "nas", "--from", gone, "--yes").code == 0
    site.run("vm", "updateconf", "web1", "--keep-last", "1", "--keep-chains", "1")
    told = site.run("image", "prune", "--dry-run", "--json").json
    removed = [action["image"] for plan in told["plans"] for action in plan["actions"] if action["action"] == "remove"]
    assert removed == [2], "the older of the two that were found, though its number is not the lowest"


def test_what_the_catalog_knows_stays_and_what_is_lost_is_marked(site, nights):
    site.run("image", "pin", "1")
    before = site.run("image", "list", "--json").json
    first = sources(site)[0]
    (site.store / first).rename(site.folder / "elsewhere")
    told = site.run("catalog", "rebuild", "nas")
    assert (told.code, "image 1, VM web1: increment 0: lost" in told.out) == (0, True)
    before[0]["state"] = "damaged"
    assert site.run("image", "list", "--json").json == before
    checked = site.run("catalog", "check", "nas", "--json")
    assert checked.code == 8
    assert json.loads(checked.out)["missing"] == [
        {"datastore": "nas", "source": first, "what": "increment 0 of image 1, VM web1"}
    ]


def test_an_image_of_which_only_a_part_is_known_gets_the_rest(site, nights):
    made = site.run("backup", "db1", "--json").json
    with Workplace(load(site.config)).catalog.writing() as connection:
        connection.execute("DELETE FROM increments WHERE source = ?", (made["source"],))
    checked = site.run("catalog", "check", "--json").json
    assert [one["source"] for one in checked["unused"]] == [made["source"]]
    told = site.run("catalog", "rebuild", "nas", "--json").json
    assert (told["added"], told["remarks"], told["changed"][0]["added"]) == ([], [], [1])
    assert sources(site, 2)[1] == made["source"]
    assert site.run("catalog", "check").code == 0


def test_another_host_finds_everything_and_its_retention_touches_nothing(site, nights):
    hosts = site.store.glob("*/manifest.json")
    for path in hosts:  # full and alone in its chain, so no link breaks
        found = json.loads(path.read_text())
        if found["vm"]["name"] == "db1":
            path.write_text(json.dumps(found | {"host": "elsewhere"}, indent=1))
    lose(site)
    made = site.run("catalog", "rebuild", "nas", "--json").json
    assert [one["host"] == "elsewhere" for one in made["added"]] == [False, True, False]
    site.run("vm", "updateconf", "db1", "--keep-last", "1", "--mode", "FULL")
    for _ in range(3):
        site.run("backup", "db1")
    assert [one["id"] for one in site.run("image", "list", "--vm", "db1", "--json").json] == [2, 6]


def half_flattened(site, until):
    """A flatten of increments 0 to 2 that died at one of its steps."""
    place = Workplace(load(site.config))
    image = images.find(place.catalog, "1")
    old = [increment.source.token for increment in image.increments]
    if until == "stored":
        kept = {token: site.folder / "kept" / token for token in old[:3]}
        for token, copy in kept.items():
            shutil.copytree(site.store / token, copy)
        flatten.flatten(place, "1", to=2)
        for token, copy in kept.items():
            copy.rename(site.store / token)
    else:
        (site.store / "fail-delete").touch()
        flatten.flatten(place, "1", to=2)
        (site.store / "fail-delete").unlink()
        for token in old[2:0:-1] if until == "two deleted" else [old[2]]:
            shutil.rmtree(site.store / token)
    new = images.find(place.catalog, "1").increments[0].source.token
    return old, new


@pytest.mark.parametrize("until", ["stored", "one deleted", "two deleted"])
def test_in_the_middle_of_a_flatten_every_night_that_is_left_comes_back(site, nights, until):
    old, new = half_flattened(site, until)
    lose(site)
    made = site.run("catalog", "rebuild", "nas", "--json").json
    assert made["added"][0]["increments"] == ([0, 1, 2, 3] if until == "stored" else [2, 3])
    for increment in made["added"][0]["increments"]:
        assert restored(site, 1, increment) == nights[1, increment]
    unused = {one["source"] for one in made["remarks"] if one["kind"] == "unused"}
    assert unused == {"stored": {new}, "one deleted": set(old[:2]), "two deleted": {old[0]}}[until]
    assert all((site.store / source).exists() for source in unused), "nothing is deleted for being unknown"
    assert site.run("catalog", "rebuild", "nas", "--json").json["added"] == []


def test_leftovers_of_a_flatten_are_known_until_they_are_deleted(site, nights):
    half_flattened(site, "one deleted")
    told = site.run("catalog", "check", "--json").json
    assert (told["missing"], told["unused"]) == ([], [])
    place = Workplace(load(site.config))
    assert flattens.owners(place.catalog) == [WEB.uuid]


def copy_of(site, source, change=lambda manifest: None):
    """A second source with the same artifacts, its manifest changed."""
    token = "f" * 31 + str(len(list(site.store.glob("f*"))))
    shutil.copytree(site.store / source, site.store / token)
    path = site.store / token / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    return token


def test_two_sources_of_one_number(site, nights):
    before = shown(site)
    kept = sources(site)
    exact = "e" * 32
    shutil.copytree(site.store / kept[1], site.store / exact)
    earlier = copy_of(site, kept[3], lambda one: one.update(point="ab" * 16, date="2001-01-01T00:00:00Z"))
    lose(site)
    made = site.run("catalog", "rebuild", "nas", "--json").json
    assert [one["increments"] for one in made["added"]] == [[0, 1, 2, 3], [0, 1, 2, 3], [0], [0]], "two ends"
    unused = {one["source"] for one in made["remarks"]}
    assert len(unused) == len(unused & {exact, kept[1]}) == 1, "one of two that are the same"
    assert {one["kind"] for one in made["remarks"]} == {"unused"}
    ends = {sources(site, image)[3]: image for image in (1, 2)}
    assert ends.keys() == {kept[3], earlier}
    assert restored(site, ends[kept[3]], 3) == nights[1, 3]
    assert len(before) == len(shown(site)) - 1


HARM = {
    "is no JSON": (lambda path: path.write_text("{"), "damaged", "not a manifest"),
    "is of a newer format": (lambda path: edit(path, format=2), "foreign", "format 2"),
    "is larger than any": (lambda path: os.truncate(path, 1 << 30), "damaged", "larger than 16 MiB"),
    "has a path for a name": (
        lambda path: edit(path, artifacts=[{"name": "../../etc/passwd", "size": 1, "digest": "0" * 64}]),
        "damaged",
        "artifacts",
    ),
    "has a path for a disk": (lambda path: edit_disk(path, id="../vda"), "damaged", "disks"),
    "has a path for a VM": (lambda path: edit(path, vm={"uuid": "../../x", "name": "x"}), "damaged", "UUID"),
    "has a number that is too large": (lambda path: edit(path, number=1 << 70), "damaged", "number"),
    "has a date that cannot be": (lambda path: edit(path, date="0001-01-01T00:00:00+14:00"), "damaged", "date"),
    "is gone": (lambda path: path.unlink(), "damaged", "no manifest"),
    "lists what is not there": (lambda path: (path.parent / "disk.vda.qcow2").unlink(), "damaged", "disk.vda.qcow2"),
    "has no labels": (lambda path: (path.parent / ".labels").write_text("{}"), "foreign", "no labels"),
}


def edit(path, **change):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def edit_disk(path, **change):
    found = json.loads(path.read_text())
    found["disks"][0] |= change
    path.write_text(json.dumps(found))


@pytest.mark.parametrize("what", HARM)
def test_what_cannot_be_used_is_listed_and_all_else_found(site, nights, what):
    harm, kind, word = HARM[what]
    victim = sources(site)[2]
    harm(site.store / victim / "manifest.json")
    lose(site)
    told = site.run("catalog", "rebuild", "nas", "--json")
    made = told.json
    assert [one["increments"] for one in made["added"]] == [[0, 1], [0], [0]]
    kinds = {one["source"]: (one["kind"], one["why"]) for one in made["remarks"]}
    assert kinds[victim][0] == kind
    assert word in kinds[victim][1]
    assert len(kinds) == 2, "and the increment that builds on it"
    assert restored(site, 1, 1) == nights[1, 1]


def test_a_datastore_that_is_away_is_an_error_and_nothing_is_added(site, nights):
    lose(site)
    site.store.rename(site.folder / "away")
    site.store.write_text("no folder")
    assert site.run("catalog", "rebuild", "nas").code == 5
    assert site.run("image", "list", "--json").json == []
    told = site.run("catalog", "check", "--json")
    assert (told.code, json.loads(told.out)["errors"][0]["datastore"]) == (5, "nas")


def test_a_backup_that_runs_keeps_its_image_out_until_it_is_done(site, nights):
    lose(site)
    (site.store / "wait").touch()
    child = site.start("backup", "web1")
    site.until((site.store / "waits").exists, "the backup")
    told = site.run("catalog", "rebuild", "nas")
    assert told.code == 3
    assert "a backup of VM web1 is already running" in told.err
    assert [one["vm"] for one in site.run("image", "list", "--json").json] == ["db1"]
    (site.store / "wait").unlink()
    child.communicate(timeout=60)
    assert child.returncode == 0
    assert len(site.run("catalog", "rebuild", "nas", "--json").json["added"]) == 2


def test_a_rebuild_that_was_killed_goes_on_where_it_stopped(site, nights):
    before = shown(site)
    lose(site)
    child = os.fork()
    if not child:  # the test's own process, to die between two images
        place = Workplace(load(site.config))
        add = images.add

        def once(catalog, image):
            add(catalog, image)
            os.kill(os.getpid(), signal.SIGKILL)

        rebuild.images.add = once
        rebuild.rebuild(place, "nas")
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(site.run("image", "list", "--json").json) == 1
    made = site.run("catalog", "rebuild", "nas", "--json").json
    assert [one["id"] for one in made["added"]] == [2, 3]
    assert shown(site) == before


def test_one_repository_under_two_names(site, nights):
    table = f'[datastores.again]\ndriver = "files"\npath = "{site.store}"\n'
    site.config.write_text(site.config.read_text() + table)
    made = site.run("catalog", "rebuild", "again", "--json").json
    assert made["added"] == []
    assert "in datastore nas" not in json.dumps(made["remarks"]), "the same sources are known"


def test_the_tables_for_people(site, nights):
    lose(site)
    out = site.run("catalog", "rebuild", "nas").out
    assert "3 images were added; the catalog knew 0 sources already" in out
    assert "web1" in out
    shutil.rmtree(site.store / sources(site)[0])
    told = site.run("catalog", "check")
    assert told.code == 8
    assert "increment 0 of image 1, VM web1" in told.out


def test_nothing_is_left_in_the_state_folder(site, nights):
    site.run("catalog", "rebuild", "nas")
    site.run("catalog", "check")
    assert not list((site.state / "runs").iterdir())
