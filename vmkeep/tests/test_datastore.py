"""``vmkeep datastore``, and the plain files that the rsync driver keeps, seen from the command."""

from __future__ import annotations

import json
import shutil

from kept_in_files import WEB


def test_what_has_nothing_to_maintain_says_so(site):
    told = site.run("datastore", "maintain", "nas")
    assert told.code == 0
    assert told.out == "datastore nas (files): needs no maintenance\n"
    assert site.run("datastore", "maintain", "nas", "--json").json["maintained"] is False
    assert site.run("datastore", "maintain", "other").code == 4


def test_a_chain_in_an_rsync_datastore(site):
    target = site.folder / "backups"
    target.mkdir()
    site.configure(datastores=f'[datastores.nas]\ndriver = "rsync"\ntarget = "{target}"\n')
    first = site.run("backup", "web1", "--json").json
    site.write(WEB, "vda", 0, b"changed since" * 1000)
    second = site.run("backup", "web1", "--json").json
    assert (first["type"], second["type"]) == ("FULL", "INCREMENT")
    folder = target / WEB.uuid / second["source"].rpartition(".")[2]
    assert {"disk.vda.qcow2", "manifest.json", "sums.vda"} <= {path.name for path in folder.iterdir()}
    assert site.run("datastore", "check", "nas", "--json").json["used"] > 0
    restored = site.run("restore", "1", "--to", str(site.folder / "to"), "--json")
    assert restored.code == 0, restored.err

    # An increment whose parent is gone is a full, and says why.
    shutil.rmtree(target / WEB.uuid / first["source"].rpartition(".")[2])
    told = site.run("backup", "web1", "--json")
    third = json.loads(told.out)
    assert told.code == 3
    assert third["type"] == "FULL"
    assert "no longer in" in third["reason"]
