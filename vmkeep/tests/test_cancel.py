"""``vmkeep cancel`` and ``vmkeep recover``, from another process than the one that works."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from kept_in_files import DB, WEB, load, save

from backupcore.errors import AccessDenied, Busy
from vmkeep import cancel as work
from vmkeep import config, lock
from vmkeep.workplace import Workplace


def waiting_backup(site, vm="web1"):
    """A backup in a process of its own, in the middle of the datastore's work."""
    (site.store / "wait").touch()
    child = site.start("backup", vm)
    site.until((site.store / "waits").exists, "the backup")
    return child


def test_cancel_stops_the_owner_and_waits_until_it_has_let_go(site):
    done = site.run("backup", "web1", "--json").json
    child = waiting_backup(site)
    told = site.run("cancel", WEB.uuid, "--json").json
    assert (told["vm"], told["process"], told["doing"], told["state"]) == ("web1", child.pid, "a backup", "cancelled")
    assert told["seconds"] < 60
    assert lock.holder(site.state, "web1") is None, "it has let go when cancel returns"
    assert child.wait(60) == 130
    assert not site.guest(WEB).busy
    assert list(site.guest(WEB).checkpoints) == [done["point"]], "the chain is as before"
    assert [path.name for path in site.store.glob("[!.]*") if path.is_dir()] == [done["source"]]
    assert not list((site.state / "runs").iterdir())
    (site.store / "wait").unlink()
    assert site.run("backup", "web1", "--json").json["type"] == "INCREMENT"


def test_cancel_needs_no_hypervisor_while_a_backup_runs(site):
    child = waiting_backup(site)
    site.guests.rename(site.folder / "away")
    try:
        told = site.process("cancel", "web1")
        assert (told.code, told.out.split(" (")[0]) == (0, "web1: a backup was stopped")
        assert f"process {child.pid} (a backup of VM web1) is told to stop" in told.err
    finally:
        (site.folder / "away").rename(site.guests)


def test_cancel_finds_a_vm_that_was_renamed_meanwhile(site):
    child = waiting_backup(site)
    site.rename(WEB, "www")
    assert site.run("cancel", "www", "--json").json["process"] == child.pid


def test_a_catalog_that_cannot_be_used_meanwhile_hides_neither_the_cancel_nor_its_reason(site):
    child = waiting_backup(site)
    for path in site.state.glob("catalog.sqlite-*"):
        path.unlink()
    (site.state / "catalog.sqlite").rename(site.folder / "aside")
    (site.state / "catalog.sqlite").write_bytes(b"not a catalog" * 1000)
    told = site.process("cancel", "web1", "--json")
    assert told.code == 0, told.err
    assert any("how the run ended cannot be read" in line for line in json.loads(told.out)["did"])
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "could not be written down: the catalog" in err
    assert err.endswith(("vmkeep: cancelled\n  It was stopped by vmkeep cancel.\n", "vmkeep: cancelled\n"))


def test_without_a_running_backup_cancel_says_so(site):
    site.run("backup", "web1")
    told = site.run("cancel", "web1")
    assert told.code == 4
    assert told.err.startswith("vmkeep: no backup of VM web1 is running\n")
    assert site.run("cancel", "web2").code == 4
    waiting_backup(site)
    assert site.run("cancel", "db1").code == 4, "another VM's backup is not meant"
    assert site.run("cancel", "web1").code == 0


def test_a_process_that_has_the_number_of_a_dead_owner_is_not_touched(site):
    site.run("backup", "web1")
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with lock.vm_run(site.state, WEB):
            held = lock.holder(site.state, "web1")
            assert held is not None
            entry = json.loads(held.path.read_text())
            held.path.write_text(json.dumps({**entry, "process": other.pid}))
            work.cancel(_place(site), "web1")
        assert other.poll() is None
    finally:
        other.kill()
        other.communicate()


def test_another_users_backup_is_refused(site, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("needs root")
    child = waiting_backup(site)
    program = (
        "import os, sys\nfrom vmkeep import cancel, lock\nfrom pathlib import Path\n"
        f"held = lock.holder(Path({str(site.state)!r}), 'web1')\nos.setresuid(65534, 65534, 65534)\n"
        "try:\n with cancel._signalled(held, print, []): pass\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": site.paths}, capture_output=True, text=True, check=True
    )
    assert out.stdout == (
        f"{AccessDenied.__name__} process {child.pid} (a backup of VM web1) belongs to another user\n"
    ), out.stderr
    assert child.poll() is None


def _place(site):
    return Workplace(config.load(site.config))


def killed_backup(site):
    child = waiting_backup(site)
    child.kill()
    child.communicate()
    (site.store / "wait").unlink()
    return (site.store / "waits").read_text()


def test_recover_puts_right_what_a_killed_backup_left_and_the_second_time_nothing(site):
    done = site.run("backup", "web1", "--json").json
    run = killed_backup(site)
    assert site.guest(WEB).busy == run
    (told,) = site.run("recover", "--json").json
    assert (told["vm"], told["uuid"], told["errors"]) == ("web1", WEB.uuid, [])
    assert told["did"][0] == f"run {run[:8]}: written down as failed, its process was killed or found no room to do so"
    assert f"let go of the guest, held by run {run}" in told["did"]
    assert told["did"][-1] == f"run {run[:8]}: released what it held, of VM web1 and in datastore nas"
    assert not site.guest(WEB).busy
    assert list(site.guest(WEB).checkpoints) == [done["point"]]
    assert not list((site.state / "runs").iterdir())
    assert site.run("recover", "--json").json == []
    assert site.run("recover", "web1").out == "nothing to put right\n"
    last = site.run("vm", "show", "web1", "--json").json["last_runs"][0]
    assert (last["state"], last["error"]["class"]) == ("failed", "Killed")


def test_recover_forgets_checkpoints_of_its_own_catalog_only(site):
    first = site.run("backup", "web1", "--json").json["point"]
    site.run("image", "delete", "1", "--yes")
    guests = load(site.guests)
    guests[0].checkpoints["another catalog's"] = {}
    save(site.guests, guests)
    (told,) = site.run("recover", "--json").json
    assert told["did"] == [f"forgot checkpoint {first}"]
    assert list(site.guest(WEB).checkpoints) == ["another catalog's"]


def test_recover_leaves_a_living_backup_alone(site):
    child = waiting_backup(site)
    assert site.run("recover", "--json").json == []
    told = site.run("recover", "web1")
    assert told.code == 10
    assert f"a backup of VM web1 is already running (process {child.pid}" in told.err
    assert site.guest(WEB).busy
    (site.store / "wait").unlink()
    child.communicate(timeout=60)
    assert child.returncode == 0


def test_recover_of_a_vm_that_was_undefined_since(site):
    run = killed_backup(site)
    site.forget(WEB)
    assert site.run("recover", "web9").code == 4
    (told,) = site.run("recover", "web1", "--json").json
    assert told["did"][-1].startswith(f"run {run[:8]}: released")
    assert not list((site.state / "runs").iterdir())


def test_recover_says_what_it_could_not_put_right_and_tries_again(site):
    killed_backup(site)
    (site.guests.parent / "fail-release").touch()
    told = site.run("recover", "--json")
    assert told.code == 11
    (one,) = json.loads(told.out)
    assert one["errors"] == [
        {"class": "HypervisorError", "message": "the guest could not be released", "hint": "See to it."}
    ]
    assert len(list((site.state / "runs").iterdir())) == 1
    (site.guests.parent / "fail-release").unlink()
    assert site.run("recover").code == 0
    assert not list((site.state / "runs").iterdir())


def test_recover_ends_a_process_that_a_dead_run_has_left_and_unmounts_nothing_else(site):
    run = killed_backup(site)
    orphan = subprocess.Popen(["sleep", "1000"], cwd=site.state / "runs" / run)
    other = subprocess.Popen(["sleep", "1000"], cwd=site.state / "runs")
    try:
        (told,) = site.run("recover", "--json").json
        assert f"ended process {orphan.pid}, which a dead run had left" in told["did"]
        assert orphan.wait(60) == -9
        assert other.poll() is None
    finally:
        for process in (orphan, other):
            process.kill()
            process.wait()


def test_a_backup_puts_its_own_vm_right_first_and_says_so(site):
    run = killed_backup(site)
    told = site.process("backup", "web1")
    assert told.code == 0
    assert f"VM web1: let go of the guest, held by run {run}" in told.err


def test_a_dead_run_whose_datastore_is_no_longer_configured_is_released(site):
    killed_backup(site)
    site.configure(datastores=f'[datastores.other]\ndriver = "files"\npath = "{site.store}"\n')
    assert site.run("recover").code == 0
    assert not site.guest(WEB).busy
    assert not list((site.state / "runs").iterdir())


def test_what_works_on_a_vm_is_named_to_the_one_that_comes_second(tmp_path):
    with (
        lock.vm_run(tmp_path, DB, "a restore in place"),
        pytest.raises(Busy, match="a restore in place of VM db1"),
        lock.vm_run(tmp_path, DB),
    ):
        pass
