"""An installation is a state folder, by an ID: whatever the host is called, and whoever else backs up the same VM."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from blake3 import blake3
from kept_in_files import WEB, load, save

from backupcore.errors import ConfigError
from backupcore.hypervisor import Checkpoint
from vmkeep import config, retention
from vmkeep.installation import MACHINE_ID, establish, known, machine
from vmkeep.workplace import Workplace


def identity(site) -> str:
    return json.loads((site.state / "installation").read_text())["installation"]


def configured(site, **options: str) -> None:
    arguments = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)]
    assert site.run("vm", "updateconf", "web1", *arguments).code == 0


def night(site, number: int, *, code: int = 0) -> dict:
    site.write(WEB, "vda", 70_000 * (number % 14), b"night %03d " % number * 3000)
    told = site.run("backup", "web1", "--json")
    assert told.code == code, told.err
    return json.loads(told.out)


def ids(site) -> list[int]:
    return [one["id"] for one in site.run("image", "list", "--json").json]


def sources(site) -> set[str]:
    return {
        one["source"]
        for image in ids(site)
        for one in site.run("image", "show", str(image), "--json").json["increments"]
    }


def stored(site) -> set[str]:
    return {path.name for path in site.store.iterdir() if path.is_dir()}


def restores(site, image: int, truth: bytes) -> None:
    to = site.folder / f"to{len(list(site.folder.iterdir()))}"
    made = site.run("restore", str(image), "--to", str(to), "--json").json
    disk = next(one["path"] for one in made["disks"] if one["id"] == "vda")
    subprocess.run(["qemu-img", "convert", "-O", "raw", disk, to / "vda.raw"], check=True)
    assert (to / "vda.raw").read_bytes() == truth


# The file


def test_it_is_made_once_and_is_its_owners_alone(tmp_path):
    state = tmp_path / "a" / "state"
    assert known(state, here="m").id == ""
    assert not state.exists(), "who only looks makes nothing"
    first = establish(state, here="m")
    assert establish(state, here="m") == first == known(state, here="m")
    assert stat.S_IMODE((state / "installation").stat().st_mode) == 0o600
    assert establish(tmp_path / "b", here="m").id != first.id


def test_another_machine_is_a_copy_and_says_so_in_one_line(tmp_path, caplog):
    first = establish(tmp_path, here="m")
    assert establish(tmp_path, here="").id == first.id, "a machine without an ID proves nothing"
    assert known(tmp_path, here="n").id == ""
    copy = establish(tmp_path, here="n", config=Path("/etc/c.toml"))
    assert copy.id != first.id
    (line,) = [record.getMessage() for record in caplog.records]
    assert f'Set [host] installation = "{first.id}" in /etc/c.toml' in line
    assert establish(tmp_path, here="n") == copy
    assert establish(tmp_path, here="x", chosen=first.id).id == first.id, "told otherwise"
    assert establish(tmp_path, here="x").id == first.id
    assert len(caplog.records) == 1


def test_a_folder_made_where_the_machine_had_no_id_stays_itself(tmp_path):
    first = establish(tmp_path, here="")
    assert establish(tmp_path, here="m").id == first.id
    assert establish(tmp_path, here="n").id != first.id


@pytest.mark.parametrize("said", ["", "{", "[]", '{"installation": "x", "machine": ""}', '{"installation": 7}', "\xff"])
def test_a_file_that_says_nothing_is_an_error_and_never_a_new_id(tmp_path, said):
    (tmp_path / "installation").write_text(said, "latin-1")
    for ask in (establish, known):
        with pytest.raises(ConfigError, match="does not say which installation this is"):
            ask(tmp_path, here="m")
    assert (tmp_path / "installation").read_text("latin-1") == said


def test_the_machine_is_known_by_a_digest(monkeypatch):
    monkeypatch.setenv(MACHINE_ID, "0123456789abcdef")
    assert machine() != ""
    assert "0123456789abcdef" not in machine()
    monkeypatch.setenv(MACHINE_ID, "uninitialized")
    assert machine() == ""


PROCESS = """
import sys
sys.path[:0] = sys.argv[2].split(":")
from pathlib import Path
from vmkeep.installation import establish
print("ready", flush=True)
for line in sys.stdin:
    print(establish(Path(sys.argv[1]) / line.strip(), here="m").id, flush=True)
"""


def test_first_commands_at_once_agree(tmp_path, installed):
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path), installed],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for number in range(20):
        for child in children:
            child.stdin.write(f"{number}\n")
            child.stdin.flush()
        assert len({child.stdout.readline() for child in children}) == 1
    for child in children:
        child.communicate(timeout=60)


# The host's name is for people


def renamed(site, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`vmkeep` on this host under another name."""
    script = 'echo "$1" > /proc/sys/kernel/hostname && shift && exec "$@"'
    command = ["unshare", "--uts", "sh", "-c", script, "sh", name, sys.executable, "-m", "vmkeep", *arguments]
    environment = {**os.environ, "PYTHONPATH": site.paths, "VMKEEP_CONFIG": str(site.config)}
    return subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a host another name")
@pytest.mark.parametrize("mode", ["FULL", "INCREMENT"])
def test_a_renamed_host_goes_on_as_before(site, mode):
    configured(site, mode=mode, keep_last="2")
    for number in range(3):
        night(site, number)
    for number in range(3, 5):
        site.write(WEB, "vda", 0, b"night %d" % number)
        done = renamed(site, "renamed", "--json", "backup", "web1")
        assert (done.returncode, done.stderr) == (0, "")
        told = json.loads(done.stdout)
        assert told["type"] == mode
        assert [one["done"] for one in told["retention"]] == [True]
    assert stored(site) == sources(site)
    assert len(sources(site)) == 2
    host = site.run("image", "show", str(ids(site)[-1]), "--json").json["host"]
    assert host == "renamed", "people see the name of today"


# Two configurations of one VM


def test_two_configurations_take_turns_and_leave_each_other_alone(site, beside):
    configured(site, keep_last="2")
    for number in range(5):
        for one in (site, beside):
            done = night(one, number)
            assert done["type"] == ("INCREMENT" if number else "FULL"), "both keep their chains"
            assert done["warnings"] == []
            assert len(sources(one)) == min(number + 1, 2), "both keep what KEEP_LAST says"
            truth = bytes(site.guest(WEB).disks["vda"])
        restores(beside, 1, truth)
    assert not sources(site) & sources(beside)
    assert stored(site) == sources(site) | sources(beside)
    owners = [one.installation for one in checkpoints(site)]
    assert sorted(owners) == sorted([identity(site)] * 2 + [identity(beside)] * 2)


def checkpoints(site) -> list[Checkpoint]:
    return list(Workplace(config.load(site.config)).hypervisor.checkpoints(WEB))


@pytest.mark.parametrize("mode", ["FULL", "INCREMENT"])
def test_what_a_rebuild_finds_of_the_other_stays_the_others(site, beside, mode):
    configured(site, mode=mode, keep_last="2", full_every="2")
    for number in range(4):
        night(site, number)
        if number < 3:
            night(beside, number)
    theirs = sources(beside)
    told = site.run("catalog", "rebuild", "nas")
    assert f"vmkeep catalog take-over nas --from {identity(beside)}" in told.out
    found = site.run("catalog", "rebuild", "nas", "--json").json
    assert found["added"] == []
    for number in range(4, 8):
        night(site, number, code=3 if mode == "FULL" or number > 5 else 0)
        assert theirs <= stored(site)
    assert {one.installation for one in checkpoints(site)} <= {identity(site), identity(beside)}
    # The other one goes on with its chain as if nothing had been.
    done = night(beside, 9)
    assert (done["type"], done["warnings"]) == (mode, [])
    kept = site.run("image", "prune", "--dry-run")
    assert (kept.code, f"installation {identity(beside)} has written it" in kept.err) == (3, True)


def test_both_have_one_name_and_one_of_them_lost_its_catalog(site, beside):
    """Two hosts of one name on one datastore: a rebuild told whose a backup is by that name."""
    configured(site, mode="FULL", keep_last="1")
    night(site, 0)
    night(beside, 1)
    shutil.rmtree(beside.state)
    assert len(beside.run("catalog", "rebuild", "nas", "--json").json["added"]) == 2
    before = stored(site)
    for number in range(2, 4):
        night(beside, number, code=3)
    assert before <= stored(site), "what either had written is there"
    assert night(site, 5)["warnings"] == []


def test_a_running_backup_of_the_other_is_left_alone(site, beside):
    night(site, 0)
    night(beside, 0)
    (site.store / "wait").touch()
    site.write(WEB, "vda", 0, b"more")
    child = site.start("backup", "web1", "--json")
    site.until((site.store / "waits").exists, "the backup")
    (site.store / "wait").unlink()
    assert night(beside, 1)["type"] == "INCREMENT"
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "")
    assert json.loads(out)["type"] == "INCREMENT"
    assert night(site, 2)["type"] == "INCREMENT"
    assert night(beside, 3)["type"] == "INCREMENT"


# A copy of the state folder on another machine


@pytest.fixture
def clone(site, beside, monkeypatch):
    """The state folder copied as it is; from then on `Beside` runs on another machine."""

    def copy():
        shutil.copytree(site.state, beside.state)
        run = beside.run

        def elsewhere(*arguments: str):
            with monkeypatch.context() as other:
                other.setenv(MACHINE_ID, "the clone's")
                return run(*arguments)

        beside.run = elsewhere
        return beside

    return copy


def test_a_clone_gets_an_id_of_its_own_and_harms_nobody(site, clone):
    configured(site, keep_last="2")
    for number in range(3):
        night(site, number)
    first, before = identity(site), stored(site)
    copy = clone()
    dry = copy.run("backup", "web1", "--dry-run", "--json")
    assert (dry.json["type"], identity(copy)) == ("FULL", first), "a dry run decides nothing"
    told = copy.run("backup", "web1", "--json")
    assert (told.code, told.err.count("\n"), first in told.err) == (0, 1, True)
    assert told.json["type"] == "FULL"
    assert identity(copy) not in ("", first)
    for number in range(3, 7):
        assert night(copy, number)["type"] == "INCREMENT"
        assert before <= stored(site), "nothing of the first one's went"
    assert night(site, 8)["type"] == "INCREMENT"
    assert night(site, 9)["warnings"] == []
    assert len(sources(site)) == 2
    restores(site, 1, bytes(site.guest(WEB).disks["vda"]))


def test_a_clone_that_is_told_that_it_is_none_goes_on(site, clone):
    configured(site, keep_last="2")
    for number in range(3):
        night(site, number)
    first = identity(site)
    copy = clone()
    copy.configure(extra=f'installation = "{first}"')
    done = night(copy, 3)
    assert (done["type"], done["image"], identity(copy)) == ("INCREMENT", 1, first)
    copy.configure()
    assert night(copy, 4)["type"] == "INCREMENT", "the machine is known now"


def test_a_clone_does_not_finish_what_the_first_one_is_at(site, clone):
    """A flatten and a run under way, sources to be deleted: all of it is in the copied folder."""
    for number in range(3):
        night(site, number)
        assert site.run("backup", "db1").code == 0
    (site.store / "die").touch()
    assert site.process("backup", "web1", "--reset").code == -9, "what it has stored is not recorded yet"
    (site.store / "die").unlink()
    with closing(sqlite3.connect(site.state / "catalog.sqlite")) as catalog, catalog:
        catalog.execute("INSERT INTO leftovers (vm_uuid, datastore, source) VALUES (?, 'nas', 'x1')", (WEB.uuid,))
        catalog.execute("INSERT INTO flattens VALUES (2, 1, 'open', '2026-01-01T00:00:00+00:00')")
        catalog.execute("UPDATE images SET state = 'flattening' WHERE number = 2")
    (site.store / "x1").mkdir()
    (site.store / "x1" / ".labels").write_text("{}")
    before = stored(site)
    copy = clone()
    assert copy.run("recover").code == 0
    assert ids(copy) == [1, 2]
    assert night(copy, 4)["type"] == "FULL"
    assert copy.run("image", "prune").code == 0
    assert before <= stored(site)
    for image in ("1", "2"):
        shown = copy.run("image", "show", image, "--json").json
        assert (shown["state"], len(shown["increments"])) == ("closed", 3)
    # The first one goes on where it was.
    assert site.run("recover").code == 0
    assert ids(site) == [1, 2, 3], "what it had stored is recorded"
    assert night(site, 5)["warnings"] == []
    assert not (site.store / "x1").exists()


# After a disaster


def test_take_over(site, beside):
    configured(site, keep_last="2")
    for number in range(3):
        night(site, number)
    gone = identity(site)
    shutil.rmtree(site.state)
    beside.run("catalog", "rebuild", "nas")
    for wrong, code in (("nobody", 4), ("0" * 32, 4)):
        told = beside.run("catalog", "take-over", "nas", "--from", wrong, "--yes")
        assert (told.code, gone in told.err) == (code, True)
    refused = beside.run("image", "flatten", "1")
    assert (refused.code, f"vmkeep catalog take-over nas --from {gone}" in refused.err) == (9, True)
    asked = beside.run("catalog", "take-over", "nas", "--from", gone)
    assert (asked.code, "--yes" in asked.err, gone in asked.out) == (2, True, True)
    assert beside.run("image", "show", "1", "--json").json["installation"] == gone
    done = beside.run("catalog", "take-over", "nas", "--from", gone[:6], "--yes", "--json").json
    assert [one["id"] for one in done["images"]] == [1]
    assert done["installation"] == identity(beside)
    assert beside.run("image", "show", "1", "--json").json["installation"] == identity(beside)
    # What is one's own goes as one's own does.
    configured(beside, mode="FULL", keep_last="1")
    assert night(beside, 5)["warnings"] == []
    assert ids(beside) == [2]
    assert stored(site) == sources(beside)


def test_vm_forget_foreign(site, beside):
    night(site, 0)
    night(beside, 0)
    gone, own = identity(site), identity(beside)
    told = beside.run("vm", "forget", "web1", "--foreign")
    assert (told.code, "--yes" in told.err) == (2, True)
    told = beside.run("vm", "forget", "web1", "--foreign", "--yes")
    assert (told.code, "removed: 1" in told.out) == (0, True)
    assert [one.installation for one in checkpoints(site)] == [own]
    assert night(beside, 1)["type"] == "INCREMENT", "its own stay"
    assert "removed: 0" in beside.run("vm", "forget", "web1", "--foreign").out
    night(site, 2)
    told = beside.run("vm", "forget", "web1")
    assert "vmkeep vm forget web1 --foreign" in told.out
    assert [one.installation for one in checkpoints(site)] == [gone]


# What older versions have left


def as_before(site) -> None:
    """What a version that knew no installations would have left: in the catalog, the datastore and on the VM."""
    for labels in site.store.glob("*/.labels"):
        said = json.loads(labels.read_text())
        del said["installation"]
        labels.write_text(json.dumps(said))
        manifest = labels.with_name("manifest.json")
        manifest.write_text(re_manifest(manifest.read_text()))
    guests = load(site.guests)
    for guest in guests:
        guest.owners.clear()
    save(site.guests, guests)
    (site.state / "installation").unlink()


def re_manifest(text: str) -> str:
    lines = [line for line in text.splitlines(keepends=True) if '"installation"' not in line]
    return "".join(lines)


def test_what_an_older_version_has_left_is_ones_own_by_the_hosts_name(site, beside):
    configured(site, keep_last="3")
    night(site, 0)
    as_before(site)
    with closing(sqlite3.connect(site.state / "catalog.sqlite")) as catalog, catalog:
        catalog.execute("UPDATE images SET installation = NULL")
        catalog.execute("UPDATE runs SET installation = NULL")
        catalog.execute("DELETE FROM identity")
        # The manifest has lost a line, and the chain goes on with what lies there.
        digest = blake3(next(site.store.glob("*/manifest.json")).read_bytes()).hexdigest()
        catalog.execute("UPDATE increments SET digest = ?", (digest,))
    done = night(site, 1)
    assert (done["type"], done["image"]) == ("INCREMENT", 1)
    assert site.run("image", "show", "1", "--json").json["installation"] == identity(site)
    night(site, 2)
    shutil.rmtree(beside.state, ignore_errors=True)
    added = beside.run("catalog", "rebuild", "nas", "--json").json["added"]
    assert [one["installation"] for one in added] == [identity(site)], "whoever has added to it last"
    restores(beside, 1, bytes(site.guest(WEB).disks["vda"]))


def test_backups_without_an_id_are_taken_over_by_the_hosts_name(site, beside):
    night(site, 0)
    as_before(site)
    for manifest in site.store.glob("*/manifest.json"):
        said = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**said, "host": "old1"}, indent=1) + "\n")
    beside.run("catalog", "rebuild", "nas")
    told = beside.run("catalog", "take-over", "nas", "--from", "nobody", "--yes")
    assert (told.code, "old1" in told.err) == (4, True)
    assert beside.run("catalog", "take-over", "nas", "--from", "old1", "--yes").code == 0
    assert beside.run("image", "show", "1", "--json").json["installation"] == identity(beside)


# A clock that was wrong


def test_nights_of_2099_displace_nothing_and_are_told(site):
    configured(site, mode="FULL", keep_last="3")
    for number in range(4):
        night(site, number)
    clock = site.folder / "clock"
    clock.write_text("2099-01-01T02:30:00+00:00")
    night(site, 4)
    night(site, 5, code=3)
    clock.unlink()
    told = night(site, 6, code=3)
    assert ids(site) == [3, 4, 5, 6, 7]
    assert len([line for line in told["warnings"] if "dated 2099-01-01, ahead of the clock" in line]) == 2
    assert site.run("vm", "list", "--json").json[-1]["last_backup"][:4] != "2099"
    night(site, 7, code=3)
    assert ids(site) == [4, 5, 6, 7, 8], "good nights go as they always do"
    for image in ("5", "6"):
        assert site.run("image", "delete", image, "--yes").code == 0
    assert night(site, 8)["warnings"] == []
    assert ids(site) == [7, 8, 9]


def test_a_clock_that_is_behind_now_makes_nobody_delete_good_backups(site):
    """Dead batteries: the host has started in 1970."""
    configured(site, mode="FULL", keep_last="3")
    for number in range(3):
        night(site, number)
    (due,) = retention.plan(Workplace(config.load(site.config)), clock=lambda: datetime(1970, 1, 1, tzinfo=UTC))
    assert len(due.warnings) == 2
    assert all("Is the host's clock right now" in told and "vmkeep image delete" not in told for told in due.warnings)


def test_full_every_comes_again_after_2099(site):
    configured(site, full_every="30d")
    clock = site.folder / "clock"
    clock.write_text("2099-01-01T02:30:00+00:00")
    night(site, 0)
    clock.unlink()
    done = night(site, 1)
    assert (done["type"], "dated 2099-01-01, ahead of the clock" in done["reason"]) == ("FULL", True)
    assert night(site, 2)["type"] == "INCREMENT"


def test_an_increment_of_2099_goes_in_its_turn(site):
    """Within a chain its own order counts: the last one is the last one, and KEEP_LAST keeps so many."""
    configured(site, keep_last="3")
    night(site, 0)
    (site.folder / "clock").write_text("2099-01-01T02:30:00+00:00")
    night(site, 1)
    (site.folder / "clock").unlink()
    for number in range(2, 6):
        assert night(site, number)["warnings"] == []
    assert len(sources(site)) == 3
    restores(site, 1, bytes(site.guest(WEB).disks["vda"]))
    listed = site.run("image", "list", "--json").json[0]
    assert listed["date"][:4] != "2099"


def test_what_a_rebuild_finds_is_put_where_its_date_says(site):
    configured(site, mode="FULL", keep_last="3")
    for number, day in enumerate(("2026-01-01", "2026-01-03", "2099-01-04", "2026-01-05")):
        (site.folder / "clock").write_text(f"{day}T02:30:00+00:00")
        night(site, number, code=3 if number == 3 else 0)
    configured(site, keep_last="0")
    with closing(sqlite3.connect(site.state / "catalog.sqlite")) as catalog, catalog:
        for table, column in (("increments", "image"), ("images", "number")):
            catalog.execute(f"DELETE FROM {table} WHERE {column} IN (2, 3)")
    added = site.run("catalog", "rebuild", "nas", "--json").json["added"]
    assert [one["id"] for one in added] == [5, 6]
    with closing(sqlite3.connect(site.state / "catalog.sqlite")) as catalog:
        order = [number for (number,) in catalog.execute("SELECT number FROM images ORDER BY sequence")]
    assert order[:3] == [1, 5, 4], "the one of 2099 comes after all that is known to be older"
    configured(site, keep_last="2")
    (site.folder / "clock").unlink()
    night(site, 7, code=3)
    assert ids(site) == [4, 6, 7]


# The file is gone


def test_an_id_that_is_gone_is_taken_again_on_the_same_machine(site):
    configured(site, keep_last="2")
    for number in range(3):
        night(site, number)
    first = identity(site)
    for gone in (Path.unlink, lambda path: (path.unlink(), path.symlink_to("nowhere"))):
        gone(site.state / "installation")
        told = site.run("backup", "web1", "--json")
        assert (told.json["type"], told.json["image"], identity(site)) == ("INCREMENT", 1, first)
        assert "was gone: this goes on as the installation that it was" in told.err
    assert night(site, 9)["warnings"] == []


def test_a_copy_whose_id_is_gone_does_not_take_it(site, clone):
    night(site, 1)
    first = identity(site)
    copy = clone()
    (copy.state / "installation").unlink()
    told = copy.run("backup", "web1", "--json")
    assert (told.json["type"], told.err.count("comes from another machine")) == ("FULL", 1)
    assert "was gone" not in told.err
    assert identity(copy) not in ("", first)


def test_an_id_of_which_nothing_but_the_catalog_is_left_is_asked_for(site):
    night(site, 1)
    first = identity(site)
    (site.state / "installation").unlink()
    (site.state / "installation.lock").unlink()
    told = site.run("backup", "web1", "--json")
    assert (told.code, first in told.error["message"]) == (2, True)
    assert f'installation = "{first}"' in told.error["hint"]
    assert not (site.state / "installation").exists()
    site.configure(extra=f'installation = "{first}"')
    assert night(site, 2)["type"] == "INCREMENT"
    site.configure()
    assert (night(site, 3)["type"], identity(site)) == ("INCREMENT", first)


def test_a_folder_of_before_the_copy_gets_one(site):
    night(site, 1)
    first = identity(site)
    (site.state / "installation.lock").write_text("")
    night(site, 2)
    (site.state / "installation").unlink()
    night(site, 3)
    assert identity(site) == first


def test_an_id_that_is_gone_is_asked_for_where_no_machine_is_known(tmp_path):
    first = establish(tmp_path, here="")
    (tmp_path / "installation").unlink()
    with pytest.raises(ConfigError, match=f"is gone, which said that this is installation {first.id}"):
        establish(tmp_path, here="m")
    assert establish(tmp_path, here="m", chosen=first.id).id == first.id
