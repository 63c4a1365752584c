"""What a driver's README says about restoring without this project is done as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from kept_in_files import WEB

from lab import quick_repository

ROOT = Path(__file__).parents[2]


def commands(driver: str) -> str:
    text = (ROOT / "drivers" / driver / "README.md").read_text()
    found = re.search(r"## Restore by hand\n.*?```sh\n(.*?)```", text, re.DOTALL)
    assert found, f"{driver}: no commands under 'Restore by hand'"
    return found[1]


@pytest.mark.parametrize("driver", ["rsync", "restic"])
def test_the_restore_by_hand(site, driver):
    store = site.folder / "backups"
    password = site.folder / "password"
    password.write_text("correct horse\n")
    password.chmod(0o600)
    if driver == "rsync":
        store.mkdir()
        options = f'target = "{store}"'
    else:
        quick_repository.make(store, "correct horse")
        options = f'repository = "{store}"\npassword_file = "{password}"\ncache = "off"'
    site.configure(datastores=f'[datastores.nas]\ndriver = "{driver}"\n{options}\n')
    first = site.run("backup", "web1", "--json").json["source"]
    site.write(WEB, "vda", 70_000, bytes(100_000))
    site.write(WEB, "vda", 300_000, b"changed since" * 1000)
    second = site.run("backup", "web1", "--json").json
    assert second["type"] == "INCREMENT"
    place = {"FULL": first, "INCREMENT": second["source"]}
    if driver == "rsync":
        place = {name: str(store / token.replace(".", "/")) for name, token in place.items()}
    work = site.folder / "by hand"
    work.mkdir()
    environment = {**os.environ, **place, "RESTIC_REPOSITORY": str(store), "RESTIC_PASSWORD_FILE": str(password)}
    done = subprocess.run(
        ["sh", "-eu", "-c", commands(driver)], cwd=work, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    subprocess.run(["qemu-img", "convert", "-O", "raw", "restored.qcow2", "raw"], cwd=work, check=True)
    truth = bytes(site.guest(WEB).disks["vda"])
    assert (work / "raw").read_bytes()[: len(truth)] == truth
