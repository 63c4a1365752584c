"""Retention and flatten from the command line: what goes, what stays, and what is left when a step is the last one."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from kept_in_files import DB, WEB

from vmkeep import config, flatten, retention
from vmkeep.workplace import Workplace


def configured(site, vm="web1", **options: str) -> None:
    arguments = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)]
    assert site.run("vm", "updateconf", vm, *arguments).code == 0


def night(site, number: int, vm=WEB) -> dict:
    """Something is written, and backed up."""
    site.write(vm, "vda", 70_000 * (number % 14), b"night %03d " % number * 3000)
    return site.run("backup", vm.name, "--json").json


def rows(site, image: int = 1) -> list[tuple[int, int, str]]:
    shown = site.run("image", "show", str(image), "--json").json
    return [(one["id"], one["pid"], one["type"]) for one in shown["increments"]]


def stored(site) -> set[str]:
    return {path.name for path in site.store.iterdir() if path.is_dir()}


def sources(site) -> set[str]:
    found = site.run("image", "list", "--json").json
    return {
        one["source"]
        for image in found
        for one in site.run("image", "show", str(image["id"]), "--json").json["increments"]
    }


def check(site, truth: dict[int, bytes], image: int = 1) -> None:
    """Every increment restores to what the guest held then, and the datastore holds nothing else."""
    assert stored(site) == sources(site)
    for number, _, _ in rows(site, image):
        to = site.folder / f"to{number}-{len(list(site.folder.iterdir()))}"
        made = site.run("restore", str(image), "--increment", str(number), "--to", str(to), "--json").json
        disk = next(one["path"] for one in made["disks"] if one["id"] == "vda")
        raw = to / "vda.raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", disk, raw], check=True)
        assert raw.read_bytes() == truth[number]


# What goes


def test_keep_last_of_increments(site):
    configured(site, keep_last="3")
    truth = {}
    for number in range(6):
        done = night(site, number)
        truth[number] = bytes(site.guest(WEB).disks["vda"])
        if number == 3:
            assert done["retention"] == [
                {
                    "action": "flatten",
                    "image": 1,
                    "to": 1,
                    "why": "KEEP_LAST=3: it has 4 increments",
                    "done": True,
                    "error": None,
                }
            ]
        assert done["warnings"] == []
        first = max(0, number - 2)
        assert rows(site) == [(first, -1, "F"), *((one, one - 1, "I") for one in range(first + 1, number + 1))]
    check(site, truth)
    assert site.guest(WEB).checkpoints.keys() == {
        one["point"] for one in site.run("image", "show", "1", "--json").json["increments"][-2:]
    }


def test_keep_last_of_one(site):
    configured(site, keep_last="1")
    truth = {}
    for number in range(4):
        done = night(site, number)
        assert done["type"] == ("INCREMENT" if number else "FULL")
        truth[number] = bytes(site.guest(WEB).disks["vda"])
        assert rows(site) == [(number, -1, "F")]
    check(site, truth)
    # The one that the last increment was taken against goes with the next run: until then it may be taken again.
    assert len(site.guest(WEB).checkpoints) == 2


def test_keep_last_of_fulls(site):
    configured(site, mode="FULL", keep_last="2")
    for number in range(4):
        night(site, number)
    assert [one["id"] for one in site.run("image", "list", "--json").json] == [3, 4]
    assert stored(site) == sources(site)
    deleted = (site.store / "deleted").read_text().split()
    assert len(deleted) == 2


def test_closed_images_are_capped_too_and_full_every_makes_them(site):
    configured(site, keep_last="2", full_every="3")
    reasons = []
    for number in range(12):
        reasons.append(night(site, number)["reason"])
    assert [reason for reason in reasons if reason][1:] == [
        f"FULL_EVERY=3: image {image} has had 3 increments" for image in (1, 2, 3)
    ]
    assert [one["id"] for one in site.run("image", "list", "--json").json] == [2, 3, 4]
    configured(site, keep_chains="1")
    told = site.run("image", "prune", "--dry-run")
    assert told.out == "web1 in nas: image 2: remove (KEEP_CHAINS=1: 1 newer closed images stay)\n"
    assert [one["id"] for one in site.run("image", "list", "--json").json] == [2, 3, 4], "a dry run touches nothing"
    assert site.run("image", "prune").out == told.out.replace("remove ", "removed ")
    assert [one["id"] for one in site.run("image", "list", "--json").json] == [3, 4]
    assert site.run("image", "prune").out == "nothing goes\n"


def test_days_are_counted_from_the_first_full_also_when_it_was_flattened(site):
    configured(site, keep_last="1", full_every="30d")
    for number in range(3):
        assert not night(site, number)["retention"] or number
    assert rows(site) == [(2, -1, "F")]
    with sqlite3.connect(site.state / "catalog.sqlite") as catalog:
        catalog.execute("UPDATE images SET began = '2026-01-01T00:00:00+00:00'")
    planned = site.run("backup", "web1", "--dry-run", "--json").json
    assert planned["type"] == "FULL"
    assert planned["reason"].startswith("FULL_EVERY=30d: image 1 is ")


def test_a_pinned_image_stays_as_it_is_and_does_not_count(site):
    configured(site, mode="FULL", keep_last="1")
    night(site, 0)
    assert site.run("image", "pin", "1").out == "image 1 of VM web1 is pinned\n"
    for number in range(1, 4):
        night(site, number)
    assert [one["id"] for one in site.run("image", "list", "--json").json] == [1, 4]
    dry = site.run("image", "prune", "web1", "--dry-run").out
    assert dry == "web1 in nas: image 1: stays (it is pinned)\n"
    for command in (("delete", "1", "--yes"), ("flatten", "1")):
        told = site.run("image", *command)
        assert (told.code, "vmkeep image unpin 1" in told.err) == (9, True)
    site.run("image", "unpin", "1")
    site.run("image", "prune", "web1")
    assert [one["id"] for one in site.run("image", "list", "--json").json] == [4]


def test_an_open_image_that_is_pinned_goes_on_growing(site):
    configured(site, keep_last="2")
    night(site, 0)
    site.run("image", "pin", "1")
    for number in range(1, 4):
        done = night(site, number)
    assert len(rows(site)) == 4
    assert done["retention"][0]["why"] == "KEEP_LAST=2: it has 4 increments, but it is pinned"
    assert done["warnings"] == []


def test_what_another_host_wrote_stays(site):
    configured(site, mode="FULL", keep_last="1")
    night(site, 0)
    with sqlite3.connect(site.state / "catalog.sqlite") as catalog:
        catalog.execute("UPDATE images SET host = 'elsewhere', installation = ?", ("f" * 32,))
    for number in (1, 2):
        site.write(WEB, "vda", 70_000 * number, b"more %d" % number)
        told = site.run("backup", "web1")
        # Nobody has wanted that it stays: it is told each time, with what ends it.
        assert (told.code, f"installation {'f' * 32} has written it" in told.err) == (3, True)
        assert f"vmkeep catalog take-over nas --from {'f' * 32}" in told.err
    assert [one["id"] for one in site.run("image", "list", "--json").json] == [1, 3]
    assert site.run("image", "prune", "--dry-run").code == 3
    assert site.run("image", "pin", "1").code == 0
    assert site.run("image", "prune").code == 0
    site.run("image", "unpin", "1")
    assert site.run("catalog", "take-over", "nas", "--from", "f" * 32, "--yes").code == 0
    assert site.run("image", "prune").code == 0
    assert [one["id"] for one in site.run("image", "list", "--json").json] == [3]


def test_a_vm_that_is_not_there_any_more_keeps_all(site):
    site.configure(extra="[defaults]\nkeep_last = 1\n")
    for _ in range(2):
        site.run("backup", "db1", "--reset")
    with sqlite3.connect(site.state / "catalog.sqlite") as catalog:
        catalog.execute("UPDATE images SET vm_uuid = '33333333-3333-4333-8333-333333333333'")
    before = stored(site)
    told = site.run("image", "prune")
    assert "all stays, its settings are not known" in told.out
    assert (told.code, stored(site)) == (0, before)
    assert DB.name in told.out


def test_what_a_flatten_has_left_in_another_datastore_waits_for_that_one(site):
    """A disk that is seldom mounted is no news each night, and what it still has to lose follows it to another name."""
    configured(site, keep_last="2")
    night(site, 0)
    night(site, 1)
    (site.store / "fail-delete").touch()
    site.write(WEB, "vda", 0, b"more")
    assert site.run("backup", "web1").code == 3
    (site.store / "fail-delete").unlink()
    kept = stored(site)
    other = site.second_store()
    away = site.folder / "away"
    site.store.rename(away)
    site.configure(datastores=f'[datastores.nas]\ndriver = "files"\npath = "{site.store}"\n{other}')
    for _ in range(3):  # with a flatten there
        told = site.run("backup", "web1", "-d", "other")
        assert (told.code, "nas" in told.err) == (0, False), told.err
    assert site.run("image", "prune").code == 3
    site.configure(datastores=f'[datastores.usb]\ndriver = "files"\npath = "{away}"\n{other}')
    assert site.run("datastore", "adopt", "usb", "--yes").code == 0
    assert site.run("backup", "web1", "-d", "usb").code == 0
    left = {path.name for path in away.iterdir() if path.is_dir()}
    assert len(kept) == 4, kept
    assert len(kept & left) == 2, "the full and the increment after it"
    assert site.run("image", "verify", "1").code == 0


def test_a_store_that_refuses_a_delete_is_a_warning_and_is_asked_again(site):
    configured(site, keep_last="2")
    night(site, 0)
    night(site, 1)
    (site.store / "fail-delete").touch()
    site.write(WEB, "vda", 0, b"more")
    told = site.run("backup", "web1", "--json")
    assert told.code == 3
    assert "2 old backups in nas are merged, but could not be deleted" in told.err
    assert "is away" in told.err
    assert rows(site) == [(1, -1, "F"), (2, 1, "I")], "the backup is done, and so is the flatten"
    assert len(stored(site)) == 4
    assert site.run("image", "prune").code == 3
    (site.store / "fail-delete").unlink()
    assert site.run("image", "prune").code == 0
    assert stored(site) == sources(site)


def test_an_image_that_cannot_be_removed_is_a_warning(site):
    configured(site, mode="FULL", keep_last="1")
    night(site, 0)
    (site.store / "fail-delete").touch()
    site.write(WEB, "vda", 0, b"more")
    told = site.run("backup", "web1", "-q")
    assert (told.code, told.out, told.err) == (3, "", "")
    (site.store / "fail-delete").unlink()
    night(site, 2)
    assert [one["id"] for one in site.run("image", "list", "--json").json] == [3]


def test_a_restore_that_goes_on_holds_the_flatten_back(site):
    configured(site, keep_last="1")
    night(site, 0)
    (site.store / "wait-restore").touch()
    child = site.start("restore", "1", "--to", str(site.folder / "to"))
    site.until((site.store / "waits").exists, "the restore")
    site.write(WEB, "vda", 0, b"more")
    told = site.run("backup", "web1", "--json")
    assert (told.code, "a backup or a restore works with it" in told.err) == (3, True)
    (site.store / "wait-restore").unlink()
    child.communicate(timeout=60)
    assert child.returncode == 0
    night(site, 2)
    assert rows(site) == [(2, -1, "F")]


def test_flatten_by_hand(site):
    for number in range(4):
        night(site, number)
    told = site.run("image", "flatten", "1", "--to", "2", "--verify-all")
    assert told.out.startswith("image 1: increments 0 to 2 are one full now, ")
    assert rows(site) == [(2, -1, "F"), (3, 2, "I")]
    again = site.run("image", "flatten", "1", "--to", "2", "--json")
    assert (again.code, "nothing to merge" in again.error["message"]) == (2, True)
    assert site.run("image", "flatten", "1", "--to", "9").code == 4
    document = site.run("image", "flatten", "1", "--json").json
    assert (document["merged"], document["increment"], document["copied"]) == ([2, 3], 3, False)
    assert stored(site) == sources(site)


def test_a_backup_meanwhile_is_refused_with_a_clear_word(site):
    for number in range(2):
        night(site, number)
    (site.store / "wait-restore").touch()
    child = site.start("image", "flatten", "1")
    site.until((site.store / "waits").exists, "the flatten")
    for command in (("backup", "web1"), ("image", "delete", "1", "--yes"), ("restore", "1", "--to", "x")):
        told = site.run(*command, "--json")
        assert told.code == 10
        assert "image 1 is in use: it is being flattened (process " in told.error["message"]
    assert site.run("image", "show", "1", "--json").json["state"] == "flattening"
    child.terminate()
    child.communicate(timeout=60)
    (site.store / "wait-restore").unlink()
    assert child.returncode == 130
    assert site.run("image", "show", "1", "--json").json["state"] == "open"
    assert night(site, 2)["type"] == "INCREMENT"


# Where any step is the last


class Killer:
    """Ends the process, as kill -9 would, when a phase begins."""

    def __init__(self, when: str) -> None:
        self.when = when

    def phase(self, name: str, total: int | None = None) -> None:
        if name == self.when:
            os._exit(9)

    def done(self, count: int) -> None:
        pass


def killed(place: Workplace, when: str) -> None:
    """`flatten` of image 1 up to increment 2, killed when a phase begins."""
    flatten.flatten(place, "1", to=2, progress=Killer(when))


def killed_in_prune(place: Workplace, when: str) -> None:
    """`prune`, killed when a phase begins."""
    retention.prune(place, progress=Killer(when))


def end_in(site, what: Callable[[Workplace, str], None], when: str) -> None:
    """One of the two above in a process of its own: a fork, since a new Python takes longer to import than to work."""
    child = os.fork()
    if not child:
        try:
            what(Workplace(config.load(site.config)), when)
        except BaseException:  # noqa: BLE001 - pytest in this process would go on to the next test
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (9, -signal.SIGKILL)


def four_nights(site) -> dict[int, bytes]:
    truth = {}
    for number in range(4):
        night(site, number)
        truth[number] = bytes(site.guest(WEB).disks["vda"])
    return truth


@pytest.mark.parametrize(
    ("when", "finished"),
    [("look", False), ("flatten", False), ("verify", True), ("record", True), ("delete", True), ("published", True)],
)
@pytest.mark.parametrize("next_run", ["backup", "prune", "flatten"])
def test_killed_between_any_two_steps(site, once, when: str, finished: bool, next_run: str):
    truth = once(site, four_nights)
    if when == "published":
        (site.store / "die").touch()  # the driver has published its source, and has not said so
    end_in(site, killed, when)
    (site.store / "die").unlink(missing_ok=True)
    assert site.run("restore", "1", "--increment", "2", "--to", str(site.folder / "meanwhile")).code == 0
    if next_run == "backup":
        assert night(site, 4)["type"] == "INCREMENT"
        truth[4] = bytes(site.guest(WEB).disks["vda"])
    elif next_run == "prune":
        assert site.run("image", "prune", "web1").code == 0
    else:
        finished = True
        assert site.run("image", "flatten", "1", "--to", "3").code == 0
        assert rows(site) == [(3, -1, "F")]
        check(site, truth)
        return
    assert site.run("image", "show", "1", "--json").json["state"] == "open"
    assert rows(site)[0] == ((2, -1, "F") if finished else (0, -1, "F"))
    check(site, truth)


def test_a_prune_that_was_killed_goes_on_with_the_next(site):
    configured(site, mode="FULL")
    for number in range(3):
        night(site, number)
    configured(site, keep_last="1")
    end_in(site, killed_in_prune, "delete")
    assert [one["state"] for one in site.run("image", "list", "--json").json] == ["closed", "closed", "open"]
    (site.store / "deleted").unlink(missing_ok=True)
    assert site.run("image", "prune").code == 0
    assert [one["id"] for one in site.run("image", "list", "--json").json] == [3]
    assert stored(site) == sources(site)


def test_a_delete_also_finds_what_an_interrupted_flatten_has_stored(site):
    for number in range(3):
        night(site, number)
    end_in(site, killed, "record")
    assert site.run("image", "delete", "1", "--yes").code == 0
    assert site.run("image", "prune").code == 0
    assert stored(site) == set()


def test_a_cancel_during_retention_is_a_warning_of_a_backup_that_is_done(site):
    configured(site, keep_last="1")
    night(site, 0)
    (site.store / "wait-restore").touch()
    site.write(WEB, "vda", 0, b"more")
    child = site.start("backup", "web1")
    site.until((site.store / "waits").exists, "the flatten")
    child.terminate()
    _, err = child.communicate(timeout=60)
    (site.store / "wait-restore").unlink()
    assert (child.returncode, "the backup is done, but afterwards: retention: cancelled" in err) == (3, True)
    assert rows(site) == [(0, -1, "F"), (1, 0, "I")]
    assert site.run("image", "prune").code == 0
    assert rows(site) == [(1, -1, "F")]


def test_an_older_catalog_is_brought_up_to_date(site):
    night(site, 0)
    new, old = site.state / "catalog.sqlite", site.state / "old.sqlite"
    with closing(sqlite3.connect(old)) as catalog, catalog:
        catalog.executescript((Path(__file__).parent / "catalogs" / "version1.sql").read_text())
        catalog.execute("ATTACH ? AS new", (str(new),))
        for table in ("increments", "images", "runs", "retired"):
            columns = ", ".join(row[1] for row in catalog.execute(f"PRAGMA table_info({table})"))
            catalog.execute(f"DELETE FROM {table}")
            catalog.execute(f"INSERT INTO {table} ({columns}) SELECT {columns} FROM new.{table}")
    for part in site.state.glob("catalog.sqlite*"):
        part.unlink()
    old.rename(new)
    configured(site, keep_last="1")
    night(site, 1)
    assert rows(site) == [(1, -1, "F")]
    assert stored(site) == sources(site)
