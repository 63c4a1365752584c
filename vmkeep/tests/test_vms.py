"""``vmkeep vm``, ``datastore``, ``driver`` and ``check``."""

from __future__ import annotations

import pytest
from kept_in_files import DB, WEB, load, save

from backupcore.model import VM
from backupcore.testing.guest import MemoryGuest


def test_the_list_shows_the_last_backup_and_never(site):
    site.run("backup", "web1")
    lines = [line.split() for line in site.run("vm", "list").out.splitlines()]
    assert lines[2][:3] == ["db1", "running", "never"]
    assert lines[3][0] == "web1"
    db, web = site.run("vm", "list", "--json").json
    assert (db["name"], db["last_backup"], db["age_seconds"]) == ("db1", None, None)
    assert web["last_backup"].endswith("Z")
    assert 0 <= web["age_seconds"] < 600


def test_show_has_disks_settings_images_and_runs(site):
    site.run("backup", "web1")
    site.store.rename(site.folder / "away")
    site.run("backup", "web1")
    shown = site.run("vm", "show", WEB.uuid, "--json").json
    assert [disk["id"] for disk in shown["disks"]] == ["vda", "vdb"]
    assert shown["chains"] == [{"datastore": "nas", "image": 1, "last_increment": 0}]
    assert [(run["state"], run["image"]) for run in shown["last_runs"]] == [("failed", None), ("recorded", 1)]
    told = site.run("vm", "show", "web1")
    assert "is away" in told.out
    assert told.code == 0
    assert site.run("vm", "show", "nobody").code == 4


def test_forget_removes_the_checkpoints_and_the_next_backup_is_a_full(site):
    site.run("backup", "web1")
    (point,) = site.guest(WEB).checkpoints
    told = site.run("vm", "forget", "web1")
    assert told.out == f"VM web1: checkpoints and overlays removed: 1\n  {point}\n"
    assert site.guest(WEB).checkpoints == {}
    assert site.run("vm", "forget", "web1", "--json").json["removed"] == []
    assert site.run("backup", "web1", "--json").json["type"] == "FULL"


def test_forget_is_busy_during_a_backup(site):
    (site.store / "wait").touch()
    child = site.start("backup", "web1")
    site.until((site.store / "waits").exists, "the backup")
    assert site.run("vm", "forget", "web1").code == 10
    child.terminate()
    child.communicate(timeout=60)


def test_updateconf_stores_and_shows(site):
    told = site.run("vm", "updateconf", "db1", "--mode", "full", "--keep-last", "3")
    assert told.code == 0
    assert told.err == ""
    assert site.guest(DB).settings == {"MODE": "FULL", "KEEP_LAST": "3"}
    config = site.run("vm", "updateconf", "db1", "--backup-volatile", "NO", "--json").json["config"]
    assert config == {
        "mode": "FULL",
        "increment_mode": "CBT",
        "fs_freeze": "NONE",
        "fs_freeze_fallback": "NO",
        "freeze_timeout": 10,
        "keep_last": 3,
        "keep_chains": None,
        "full_every": "0",
        "verify_flatten": "SAMPLE",
        "backup_volatile": "NO",
        "volatile_disks": [],
        "exclude_disks": [],
        "encrypted_disks": "REFUSE",
        "redact": "NO",
        "own": ["backup_volatile", "keep_last", "mode"],
    }


@pytest.mark.parametrize(
    ("option", "value", "code", "said"),
    [
        ("--mode", "SOMETIMES", 2, "'FULL', 'INCREMENT'"),
        ("--keep-last", "-1", 2, "0<=x<=999999"),
        ("--freeze-timeout", "0", 2, "1<=x<=600"),
        ("--exclude-disks", "vda,vdz,vdy", 4, "VM db1 has no disk vdz, vdy, which EXCLUDE_DISKS would name"),
        ("--volatile-disks", "../vda", 2, "VOLATILE_DISKS must be a list of disks (vdb,vdc)"),
    ],
)
def test_updateconf_refuses(site, option, value, code, said):
    told = site.run("vm", "updateconf", "db1", option, value)
    assert (told.code, said.lower() in told.err.lower()) == (code, True), told.err
    assert site.guest(DB).settings == {}


def test_updateconf_takes_lists_of_disks_and_empties_them(site):
    options = ("--exclude-disks", "vda", "--fs-freeze", "agent", "--freeze-timeout", "5", "--encrypted-disks", "plain")
    config = site.run("vm", "updateconf", "db1", *options, "--json").json["config"]
    shown = {"exclude_disks": ["vda"], "fs_freeze": "AGENT", "freeze_timeout": 5, "encrypted_disks": "PLAIN"}
    assert config | shown == config
    config = site.run("vm", "updateconf", "db1", "--exclude-disks", "", "--json").json["config"]
    assert config["exclude_disks"] == []
    assert site.guest(DB).settings["EXCLUDE_DISKS"] == ""


def test_settings_that_somebody_wrote_by_hand_are_checked(site):
    guests = load(site.guests)
    guests[0].settings = {"MODE": "Full", "MDOE": "FULL", "FREEZE_TIMEOUT": "1e3"}
    save(site.guests, guests)
    told = site.run("backup", "web1")
    assert told.code == 2
    wrong = "MODE must be one of FULL, INCREMENT; 'MDOE' is no setting; FREEZE_TIMEOUT must be a number from 1 to 600"
    assert f"VM web1: {wrong}" in told.err


def test_the_hypervisor_away(site):
    site.guests.unlink()
    assert site.run("vm", "list").code == 11
    assert site.run("backup", "web1", "--json").error["class"] == "HypervisorError"


def test_datastores_and_drivers(site):
    site.run("backup", "web1")
    listed = site.run("datastore", "list", "--json").json
    assert [(one["name"], one["driver"], one["images"]) for one in listed] == [("nas", "files", 1)]
    checked = site.run("datastore", "check", "nas", "--json").json
    assert (checked["ok"], checked["total"]) == (True, None)
    assert checked["used"] > 0
    assert site.run("datastore", "check", "nax").err == "vmkeep: no datastore 'nax' in " + (
        f"{site.config}\n  Did you mean nas?\n"
    )
    site.store.rename(site.folder / "away")
    assert site.run("datastore", "check", "nas").code == 5
    drivers = {one["name"]: one["package"] for one in site.run("driver", "list", "--json").json}
    assert drivers["files"] == "kept-in-files 1.0"
    assert "broken" in drivers, "it is listed without being loaded"


def test_a_run_tells_what_it_is_and_how_far_it_came(site):
    site.run("backup", "web1")
    site.store.rename(site.folder / "away")
    assert site.run("backup", "web1").code == 5
    (site.folder / "away").rename(site.store)
    (site.store / "exit").write_text("9")  # before anything is stored
    assert site.process("backup", "web1").code == 1
    (site.store / "exit").unlink()
    assert site.run("recover").code == 0
    assert site.run("backup", "web1").code == 0
    found = site.run("vm", "show", "web1", "--json").json["last_runs"]
    assert [(run["kind"], run["type"], run["state"], run["phase"]) for run in reversed(found)] == [
        ("backup", "FULL", "recorded", None),
        ("backup", "INCREMENT", "failed", "prepare"),
        ("backup", "INCREMENT", "failed", "backup"),
        ("backup", "INCREMENT", "recorded", None),
    ]


def test_check_looks_at_everything_and_exits_with_the_first_failure(site):
    assert site.run("check", "--json").json["ok"] is True
    site.store.rename(site.folder / "away")
    two = "".join(f'[datastores.{name}]\ndriver = "files"\npath = "{site.store}"\n' for name in ("nas", "cloud"))
    site.configure(datastores=two)
    told = site.run("check")
    assert told.code == 5
    assert [line.split(":")[0] for line in told.out.splitlines() if not line.startswith("  ")] == [
        "ok      configuration",
        "ok      state",
        "ok      installation",
        "ok      memory",
        "failed  datastore nas",
        "failed  datastore cloud",
    ]
    assert "  Bring it back." in told.out
    site.config.write_text("[host")
    assert site.run("check").code == 2


def test_site_plugins_are_loaded_and_a_bad_one_is_named(site):
    site.configure(extra='plugins = ["kept_in_files:Note"]')
    assert site.run("backup", "web1").code == 0
    assert (site.guests.parent / "noted").read_text() == "web1"
    site.configure(extra='plugins = ["kept_in_files:Nothing"]')
    told = site.run("backup", "web1")
    assert (told.code, "the site plugin 'kept_in_files:Nothing' cannot be loaded" in told.err) == (2, True)


@pytest.mark.parametrize("what", ["sys.exit(0)", "raise asyncio.CancelledError"])
def test_a_site_plugin_that_ends_the_program_does_not_end_a_backup_with_success(site, monkeypatch, what):
    (site.folder / "leaving.py").write_text(f"import asyncio, sys\n{what}\n")
    monkeypatch.syspath_prepend(str(site.folder))
    site.configure(extra='plugins = ["leaving:anything"]')
    told = site.run("backup", "web1")
    assert told.code == 1
    assert "the site plugin 'leaving:anything' cannot be loaded: it failed with" in told.err


LEAVING = """
import os
from backupcore import hookimpl

class Leaving:
    @hookimpl(tryfirst=True)
    def backup(self):
        child = os.fork()
        if not child:
            os._exit(0)  # a child of its own, as a library has them
        assert os.waitpid(child, 0)[1] == 0
        os._exit(0)
"""


def test_a_plugin_that_ends_the_process_does_not_end_a_backup_with_success(site):
    (site.folder / "leaving.py").write_text(LEAVING)
    site.paths = f"{site.folder}:{site.paths}"
    site.configure(extra='plugins = ["leaving:Leaving"]')
    told = site.process("backup", "web1", "--json")
    assert (told.code, told.out, told.error["exit_code"]) == (1, "", 1)
    assert f"backup in {site.folder}/leaving.py, line 12, has ended vmkeep (os._exit(0))" in told.error["message"]
    assert "vmkeep recover" in told.error["hint"]
    site.configure()
    assert site.process("backup", "web1").code == 0
    first = site.run("vm", "show", "web1", "--json").json["last_runs"][1]
    assert first["state"] == "failed"


def test_a_vm_that_is_called_as_the_uuid_of_another(site):
    """Neither is ever taken for the other: not by who types that word, and not by what looks for a VM of its own."""
    called = VM(uuid="33333333-3333-4333-8333-333333333333", name=WEB.uuid)
    guests = site.guests
    save(guests, [site.guest(WEB), MemoryGuest(called, {"vda": bytearray(1 << 20)})])
    for command in (("backup", WEB.uuid), ("vm", "forget", WEB.uuid), ("recover", WEB.uuid)):
        refused = site.run(*command)
        assert (refused.code, "the UUID of another" in refused.err) == (2, True)
    for vm in ("web1", called.uuid, "web1"):
        assert site.run("backup", vm).code == 0
    assert [one["image"] for one in site.run("vm", "show", "web1", "--json").json["chains"]] == [1]
    assert [one["state"] for one in site.run("image", "list", "--json").json] == ["open", "open"]
    before = bytes(site.guest(called).disks["vda"])
    save(guests, [site.guest(called)])
    refused = site.run("restore", "1", "--in-place")
    assert (refused.code, "is not on this host" in refused.err) == (4, True)
    assert bytes(site.guest(called).disks["vda"]) == before
