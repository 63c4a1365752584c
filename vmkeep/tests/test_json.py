"""docs/json.md lists the keys that the commands print: all of them, and no others."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from kept_in_files import WEB, load, save

from backupcore.model import Image, LeftOut
from backupcore.restore import RestoredDisk
from vmkeep.cli import exits
from vmkeep.cli.documents import parts, restores
from vmkeep.config import load as load_config
from vmkeep.in_place import Replaced
from vmkeep.workplace import Workplace

PAGE = Path(__file__).parent.parent.parent / "docs" / "json.md"


def documented() -> dict[str, set[str]]:
    sections = re.split(r"^## vmkeep ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    found = {}
    for section in sections:
        title, _, body = section.partition("\n")
        rows = [line.split("|")[1] for line in body.splitlines() if line.startswith("| `")]
        found[title.strip()] = {key for row in rows for key in re.findall(r"`([^`]+)`", row)}
    return found


def keys(document: object, before: str = "") -> set[str]:
    """Every key of a document, written as on the page."""
    if isinstance(document, dict):
        prefix = f"{before}." if before else ""
        return {f"{prefix}{key}" for key in document} | {
            inner for key, value in document.items() for inner in keys(value, f"{prefix}{key}")
        }
    if isinstance(document, list):
        return {inner for value in document for inner in keys(value, f"{before}[]")}
    return set()


@pytest.fixture
def printed(site):
    """Every command's document."""
    guests = load(site.guests)
    guests[0].files = {"kernel": b"bzImage"}
    save(site.guests, guests)
    found = {"backup --dry-run": site.run("backup", "web1", "--dry-run", "--json").json}
    found["backup"] = site.run("backup", "web1", "--json").json
    site.store.rename(site.folder / "away")
    site.run("backup", "web1")
    (site.folder / "away").rename(site.store)
    for command in (
        "image list",
        "image show 1",
        "vm list",
        "vm show web1",
        "vm updateconf web1",
        "check",
    ):
        found[" ".join(command.split()[:2])] = site.run(*command.split(), "--json").json
    for command in ("cancel", "recover"):
        (site.store / "waits").unlink(missing_ok=True)
        (site.store / "wait").touch()
        child = site.start("backup", "web1")
        site.until((site.store / "waits").exists, "the backup")
        if command == "recover":
            child.kill()
            child.wait()
            (site.guests.parent / "fail-release").touch()
            found[command] = json.loads(site.run(command, "--json").out)
            (site.guests.parent / "fail-release").unlink()
        else:
            found[command] = site.run(command, "web1", "--json").json
    (site.store / "wait").unlink()
    site.run("vm", "updateconf", "web1", "--keep-last", "1")
    for command in ("image pin 1", "image unpin 1", "image prune", "image verify 1"):
        found[" ".join(command.split()[:2])] = site.run(*command.split(), "--json").json
    site.run("vm", "updateconf", "web1", "--keep-last", "0")
    site.run("backup", "web1")
    site.write_unseen(WEB, "vda", 70_000, b"x")
    found["vm compare"] = json.loads(site.run("vm", "compare", "web1", "--json").out)
    found["image flatten"] = site.run("image", "flatten", "1", "--json").json
    found["vm forget"] = site.run("vm", "forget", "web1", "--json").json
    site.run("backup", "web1")
    site.run("vm", "updateconf", "web1", "--keep-last", "1")
    found["backup"] = site.run("backup", "web1", "--json").json
    found["image prune"]["plans"][0]["actions"] = found["backup"]["retention"]
    found["restore"] = site.run("restore", "1", "--to", str(site.folder / "to"), "--json").json
    disk = RestoredDisk(id="vda", path=Path("/vda"), virtual_size=1, layers=(), artifact="disk.vda.qcow2")
    image = Image(uuid="0" * 32, number=1, vm=WEB, datastore="nas", state="open", increments=())
    done = Replaced(vm=WEB, image=image, number=0, disks=(disk,), kept={}, nvram=Path("/nvram"), tpm=Path("/tpm"))
    found["restore --in-place"] = restores.replaced(done, "files")
    for command in (
        "datastore list",
        "datastore show nas",
        "datastore check nas",
        "datastore maintain nas",
        "driver list",
        "image delete 1 --yes",
    ):
        found[" ".join(command.split()[:2])] = site.run(*command.split(), "--json").json
    site.run("backup", "web1")
    damaged = site.run("backup", "db1", "--json").json["source"]
    place = Workplace(load_config(site.config))
    with place.catalog.writing() as connection:
        for table in ("increments", "images"):
            connection.execute(f"DELETE FROM {table}")
    (site.store / damaged / "vm.xml").unlink()
    found["catalog rebuild"] = site.run("catalog", "rebuild", "nas", "--json").json
    number = found["catalog rebuild"]["added"][0]["id"]
    next(
        one for one in site.store.iterdir() if one.name in str(site.run("image", "show", str(number), "--json").json)
    ).rename(site.folder / "gone")
    found["catalog rebuild"]["changed"] = site.run("catalog", "rebuild", "nas", "--json").json["changed"]
    site.run("backup", "db1", "--reset")
    with place.catalog.writing() as connection:
        connection.execute("UPDATE images SET installation = ?", ("f" * 32,))
    found["catalog take-over"] = site.run("catalog", "take-over", "nas", "--from", "ffff", "--yes", "--json").json
    site.config.write_text(
        site.config.read_text() + f'[datastores.away]\ndriver = "files"\npath = "{site.folder}/away"\n'
    )
    found["catalog check"] = json.loads(site.run("catalog", "check", "--json").out)
    site.config.write_text(site.config.read_text().replace("[datastores.nas]", "[datastores.vault]"))
    found["datastore adopt"] = site.run("datastore", "adopt", "vault", "--yes", "--json").json
    found["driver test"] = site.run(
        "driver", "test", "files", "-o", f"path={site.store}", "--check=hooks", "--json"
    ).json
    found["driver new"] = site.run("driver", "new", "tape", "--to", str(site.folder), "--json").json
    site.config.unlink()
    found["init"] = site.run("init", "--json").json
    return found


def test_the_page_lists_exactly_the_keys_that_are_printed(printed):
    # What this host has nothing of: disks that are left out, processes that do not end (see test_hanging), sources that
    # were merged without the catalog (see test_standing).
    assert parts.left_out((LeftOut(id="sda", reason="a CD"),)) == [{"id": "sda", "reason": "a CD"}]
    never_here = {"left_out[].id", "left_out[].reason"}
    never_here |= {f"left[].{key}" for key in ("process", "name", "why", "since")}
    never_here |= {f"superseded[].{key}" for key in ("datastore", "source", "what")}
    page = documented()
    assert set(page) == set(printed)
    for command, document in printed.items():
        assert keys(document) | (never_here & page[command]) == page[command], command


def test_the_page_lists_every_exit_code():
    listed = {int(number) for number in re.findall(r"^\| (\d+) \|", PAGE.read_text(), flags=re.MULTILINE)}
    assert listed == {0, exits.USAGE, exits.WARNING, exits.CANCELLED, *exits.CODES.values()}
