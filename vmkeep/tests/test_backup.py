"""``vmkeep backup``, with real plugins, a real catalog, and real processes."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import subprocess
import threading

import pytest
from kept_in_files import DB, WEB

from backupcore.context import Context
from vmkeep import interrupt


def test_the_first_is_a_full_and_the_next_an_increment(site):
    first = site.run("backup", "web1", "--json").json
    assert (first["image"], first["increment"], first["type"], first["parent"]) == (1, 0, "FULL", None)
    assert first["reason"] == "first backup of this VM in this datastore"
    assert (site.store / first["source"] / "manifest.json").exists()
    site.write(WEB, "vda", 1 << 20, b"second")
    second = site.run("backup", WEB.uuid, "--json").json
    assert (second["image"], second["increment"], second["type"], second["parent"]) == (1, 1, "INCREMENT", 0)
    assert second["size"] < first["size"]
    shown = site.run("image", "show", "1", "--json").json
    assert [one["source"] for one in shown["increments"]] == [first["source"], second["source"]]
    assert not list((site.state / "runs").iterdir())


def test_reset_begins_a_new_image_and_closes_the_old_one(site):
    site.run("backup", "web1")
    reset = site.run("backup", "web1", "--reset", "--json").json
    assert (reset["image"], reset["reason"]) == (2, "reset asked for")
    assert [one["state"] for one in site.run("image", "list", "--json").json] == ["closed", "open"]


def test_an_increment_that_is_impossible_becomes_a_full_with_the_reason(site):
    first = site.run("backup", "web1", "--json").json
    (site.store / first["source"]).rename(site.folder / "elsewhere")
    told = site.run("backup", "web1", "--json")
    second = json.loads(told.out)
    assert (told.code, second["image"], second["type"]) == (3, 2, "FULL")
    gone = f"increment 0 of image 1 (source {first['source']}) is no longer in datastore nas"
    assert second["reason"] == f"{gone}: something else has removed it"
    runs = site.run("vm", "show", "web1", "--json").json["last_runs"]
    assert [(run["type"], run["state"], run["image"]) for run in runs] == [
        ("FULL", "recorded", 2),
        ("FULL", "recorded", 1),
    ]


def test_a_dry_run_says_what_would_be_done_and_touches_nothing(site):
    planned = site.run("backup", "web1", "--dry-run", "--json").json
    assert (planned["type"], planned["image"], planned["size"]) == ("FULL", None, 5 << 20)
    assert [disk["id"] for disk in planned["disks"]] == ["vda", "vdb"]
    assert not site.state.exists()
    assert not list(site.store.iterdir())
    site.run("backup", "web1")
    told = site.run("backup", "web1", "--dry-run")
    assert "web1: INCREMENT backup would go into image 1 in nas" in told.out
    assert not site.guest(WEB).busy


def test_a_failed_run_is_written_down_and_leaves_nothing(site):
    site.store.rmdir()
    told = site.run("backup", "web1", "--json")
    assert told.code == 5
    assert told.out == ""
    assert told.error == {
        "class": "TargetUnavailable",
        "message": f"{site.store} is away",
        "hint": "Bring it back.",
        "exit_code": 5,
    }
    run = site.run("vm", "show", "web1", "--json").json["last_runs"][0]
    assert (run["state"], run["error"]["class"], run["image"]) == ("failed", "TargetUnavailable", None)
    assert not list((site.state / "runs").iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cancels_the_run_and_releases_the_guest(site, number):
    (site.store / "wait").touch()
    child = site.start("backup", "web1")
    site.until((site.store / "waits").exists, "the backup")
    assert site.guest(WEB).busy
    child.send_signal(number)
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err.splitlines()[-1] == "vmkeep: cancelled"
    assert "Traceback" not in err
    assert not site.guest(WEB).busy
    assert not list((site.state / "runs").iterdir())
    assert site.run("vm", "show", "web1", "--json").json["last_runs"][0]["state"] == "cancelled"


def test_a_stop_that_was_asked_for_before_there_was_a_context_reaches_it(tmp_path):
    stop, ctx, heard = interrupt.Stop(), Context(tmp_path), threading.Event()
    stop.ask()
    with ctx.on_cancel(heard.set), stop.reaches(ctx):
        assert heard.wait(60)


def test_a_second_backup_of_the_same_vm_is_busy_and_another_vm_is_not(site):
    (site.store / "wait").touch()
    child = site.start("backup", "web1")
    site.until((site.store / "waits").exists, "the backup")
    told = site.process("backup", "web1")
    assert told.code == 10
    assert told.err.startswith(f"vmkeep: a backup of VM web1 is already running (process {child.pid}, since 2")
    (site.store / "wait").unlink()
    assert site.process("backup", "db1").code == 0
    child.communicate(timeout=60)
    assert child.returncode == 0
    assert {one["vm"] for one in site.run("image", "list", "--json").json} == {"web1", "db1"}


def test_what_a_killed_run_held_is_released_by_the_next_run(site):
    site.run("backup", "web1")
    (site.store / "wait").touch()
    child = site.start("backup", "web1")
    site.until((site.store / "waits").exists, "the backup")
    child.kill()
    child.communicate()
    (site.store / "wait").unlink()
    left = (site.store / "waits").read_text()
    assert [folder.name for folder in (site.state / "runs").iterdir()] == [left]
    assert site.guest(WEB).busy == left
    assert site.process("backup", "db1").code == 0
    assert (site.state / "runs" / left).exists(), "another VM's run must leave it alone"
    told = site.run("backup", "web1", "--json").json
    assert (told["type"], told["increment"]) == ("INCREMENT", 1)
    assert not list((site.state / "runs").iterdir())
    assert f"{left} failed" in (site.guests.parent / "released").read_text()
    states = [run["state"] for run in site.run("vm", "show", "web1", "--json").json["last_runs"]]
    assert states == ["recorded", "failed", "recorded"]


def test_a_killed_full_that_was_planned_as_an_increment_is_released_too(site):
    first = site.run("backup", "web1", "--json").json
    (site.store / first["source"]).rename(site.folder / "elsewhere")
    (site.store / "wait").touch()
    child = site.start("backup", "web1")
    site.until((site.store / "waits").exists, "the backup")
    child.kill()
    child.communicate()
    (site.store / "wait").unlink()
    assert len(site.guest(WEB).checkpoints) == 2
    new = site.run("backup", "web1", "--json").json
    assert list(site.guest(WEB).checkpoints) == [new["point"]]


def test_a_run_that_was_killed_after_its_record_keeps_its_checkpoint(site):
    site.run("backup", "web1")
    (site.guests.parent / "die-in-release").touch()
    assert site.process("backup", "web1").code == -9
    (site.guests.parent / "die-in-release").unlink()
    assert len(list((site.state / "runs").iterdir())) == 1
    third = site.run("backup", "web1", "--json").json
    assert (third["type"], third["increment"]) == ("INCREMENT", 2)
    assert " recorded " in (site.guests.parent / "released").read_text().splitlines()[1]


def killed_after_storing(site, *arguments):
    (site.store / "die").touch()
    assert site.process("backup", "web1", *arguments).code == -9
    (site.store / "die").unlink()


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_run_killed_after_it_was_stored_is_recorded_by_the_next(site, before):
    for _ in range(before):
        site.run("backup", "web1")
    site.write(WEB, "vda", 1 << 20, b"between the store and the record")
    killed_after_storing(site)
    truth = bytes(site.guest(WEB).disks["vda"])
    site.write(WEB, "vda", 1 << 20, b"what came after it, and in the same place")
    told = site.run("backup", "web1", "--json")
    assert (told.json["type"], told.json["increment"]) == ("INCREMENT", before + 1)
    assert [one["id"] for one in site.run("image", "show", "1", "--json").json["increments"]] == list(range(before + 2))
    to = site.folder / "to"
    disk = site.run("restore", "1", "--increment", str(before), "--disk", "vda", "--to", str(to), "--json").json
    out = site.folder / "raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", disk["disks"][0]["path"], out], check=True)
    assert out.read_bytes() == truth
    assert len(site.guest(WEB).checkpoints) == 2
    assert site.run("vm", "show", "web1", "--json").json["last_runs"][1]["state"] == "recorded"
    assert site.run("catalog", "check").out == "the catalog and the datastores agree\n"


def test_a_reset_that_was_killed_after_it_was_stored_is_recorded_as_a_new_image(site):
    site.run("backup", "web1")
    killed_after_storing(site, "--reset")
    assert site.run("backup", "web1", "--json").json["image"] == 2
    assert [one["state"] for one in site.run("image", "list", "--json").json] == ["closed", "open"]


@pytest.mark.parametrize("harm", ["manifest", "disk"])
def test_what_a_killed_run_stored_and_is_not_as_it_should_be_stays_unused(site, harm):
    site.run("backup", "web1")
    killed_after_storing(site)
    noted = next((site.state / "runs").glob("*/prepared.json"))
    point = json.loads(json.loads(noted.read_text())["run"])["point"]
    labels = next(path for path in site.store.glob("*/.labels") if point in path.read_text())
    if harm == "manifest":
        path = labels.with_name("manifest.json")
        path.write_bytes(path.read_bytes().replace(b'"point": "', b'"point": "0', 1))
    else:
        labels.with_name("disk.vda.qcow2").unlink()
    told = site.run("backup", "web1", "--json")
    assert told.json["increment"] == 1
    assert len(site.run("catalog", "check", "--json").json["unused"]) == 1
    assert labels.exists(), "nothing is deleted for being unknown"


def test_what_a_killed_run_stored_and_is_labelled_with_another_point_is_told(site):
    """As what another installation has stored: no run of this one was to store that point."""
    site.run("backup", "web1")
    killed_after_storing(site)
    noted = next((site.state / "runs").glob("*/prepared.json"))
    point = json.loads(json.loads(noted.read_text())["run"])["point"]
    labels = next(path for path in site.store.glob("*/.labels") if point in path.read_text())
    labels.write_text(labels.read_text().replace(point, "0" * 32))
    told = site.run("backup", "web1", "--json")
    assert (told.code, "newer backups (increment 1) of image 1" in told.err) == (3, True)
    assert labels.exists(), "nothing is deleted for being unknown"


def test_a_guest_is_released_where_the_datastore_of_a_killed_run_is_away(site):
    site.run("backup", "web1")
    killed_after_storing(site)
    site.store.rename(site.folder / "away")
    assert site.run("backup", "web1").code == 5
    (site.folder / "away").rename(site.store)
    assert site.run("backup", "web1", "--json").json["increment"] == 1


def test_a_release_that_fails_is_a_warning_and_the_backup_is_done(site):
    (site.guests.parent / "fail-release").touch()
    told = site.run("backup", "web1")
    assert told.code == 3
    assert "the backup is done, but afterwards: the guest could not be released" in told.err
    assert told.err.count("could not be released") == 1
    assert len(site.run("image", "list", "--json").json) == 1


def test_a_part_of_the_vm_that_is_away_is_a_warning_and_the_backup_is_done(site):
    (site.guests.parent / "nvram-is-away").touch()
    told = site.run("backup", "web1")
    assert told.code == 3
    assert "vmkeep: the backup is done, but nvram is not in it: /nvram is missing\n" in told.err
    told = site.run("backup", "web1", "--json")
    assert (told.code, json.loads(told.out)["warnings"]) == (3, ["nvram is not in it: /nvram is missing"])
    assert [one["state"] for one in site.run("vm", "show", "web1", "--json").json["last_runs"]] == ["recorded"] * 2


def test_settings_come_from_the_vm_then_from_the_defaults(site):
    site.configure(extra='[defaults]\nmode = "FULL"')
    assert [site.run("backup", "web1", "--json").json["image"] for _ in range(2)] == [1, 2]
    site.run("vm", "updateconf", "web1", "--mode", "INCREMENT")
    assert site.run("backup", "web1", "--json").json["image"] == 3


def test_the_datastore_must_be_named_where_there_are_several(site):
    two = "".join(f'[datastores.{name}]\ndriver = "files"\npath = "{site.store}"\n' for name in ("nas", "cloud"))
    site.configure(datastores=two)
    told = site.run("backup", "web1")
    assert told.code == 2
    assert "several datastores are configured: cloud, nas" in told.err
    told = site.run("backup", "web1", "-d", "clowd", "--json")
    assert (told.code, told.error["hint"]) == (4, "Did you mean cloud?")
    assert site.run("backup", "web1", "-d", "cloud", "--json").json["datastore"] == "cloud"
    assert site.run("backup", "web1", "-d", "nas", "--json").json["type"] == "FULL"


def test_checkpoints_of_a_deleted_image_go_with_the_next_run(site):
    point = site.run("backup", "web1", "--json").json["point"]
    site.run("image", "delete", "1", "--yes")
    assert list(site.guest(WEB).checkpoints) == [point]
    new = site.run("backup", "web1", "--json").json
    assert new["image"] == 2
    assert list(site.guest(WEB).checkpoints) == [new["point"]]
    with sqlite3.connect(site.state / "catalog.sqlite") as catalog:
        assert catalog.execute("SELECT count(*) FROM retired").fetchone() == (0,)


def test_an_unknown_vm(site):
    told = site.run("backup", "web2")
    assert (told.code, told.err) == (4, "vmkeep: no VM web2\n  Did you mean web1?\n")
    assert DB.name not in told.out


@pytest.mark.parametrize("which", [0, 1])
def test_after_a_source_was_removed_by_hand_the_next_is_a_full_and_says_why(site, which):
    sources = [site.run("backup", "web1", "--json").json["source"] for _ in range(2)]
    shutil.rmtree(site.store / sources[which])
    told = site.run("backup", "web1", "--json")
    made = json.loads(told.out)
    assert (told.code, made["type"], made["image"]) == (3, "FULL", 2)
    assert made["reason"].startswith(f"increment {which} of image 1 (source {sources[which]}) is no longer in")
    assert site.run("restore", "2", "--to", str(site.folder / "to")).code == 0
