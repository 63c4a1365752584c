"""kill -9 of delete, prune and rebuild at every named step, then: nothing restorable is lost, the next run ends it.

The steps are functions of the product, told by Python's profiler (`lab.kill_at`); one that is never reached turns a
test red. (Those of a flatten by hand are in test_retention, of a backup in tests/test_killed.py.)
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
from kept_in_files import WEB

DELETE = {
    "the image is locked": "vmkeep.lock:image_exclusive return",
    "before it is closed": "vmkeep.catalog.images:close call",
    "it is closed": "vmkeep.catalog.images:close return",
    "before the datastore deletes": "kept_in_files:FileDriver.delete call",
    "the newest source is gone": "shutil:rmtree return",
    "all sources are gone": "kept_in_files:FileDriver.delete return",
    "before the records go": "vmkeep.catalog.images:remove call",
    "while the records go": "vmkeep.catalog.points:retire return",
    "the records are gone": "vmkeep.catalog.images:remove return",
}
PRUNE = {
    "the plan is made": "vmkeep.retention:plan return",
    "the image that goes is closed": "vmkeep.catalog.images:close return",
    "its newest source is gone": "shutil:rmtree return",
    "all its sources are gone": "kept_in_files:FileDriver.delete return",
    "its records are gone": "vmkeep.catalog.images:remove return",
    "a flatten is written down": "vmkeep.catalog.flattens:begin return",
    "its layers are known": "backupcore.merging:MergedDisk.__init__ return",
    "its result is written": "kept_in_files:FileDriver.backup call",
    "its result is stored": "backupcore.datastore:Datastore.backup return",
    "before the proof": "backupcore.proof:prove call",
    "its result is proved": "backupcore.proof:prove return",
    "before its record": "vmkeep.catalog.flattens:record call",
    "in its record": "vmkeep.catalog.points:retire return 1",
    "it is recorded": "vmkeep.catalog.flattens:record return",
    "the first of what it merged is gone": "shutil:rmtree return 4",
    "all that it merged is gone": "kept_in_files:FileDriver.delete return 1",
    "that is written down": "vmkeep.catalog.flattens:drop return",
}
"""A number at the end: so many times the step is let pass."""
REBUILD = {
    "the catalog is made": "vmkeep.catalog.database:Catalog.open return",
    "the sources are listed": "backupcore.datastore:Datastore.sources return",
    "a manifest is read": "backupcore.survey:look_at return",
    "all manifests are read": "backupcore.survey:put_together call",
    "before an image is recorded": "vmkeep.catalog.images:add call",
    "in its record": "vmkeep.catalog.images:insert return",
    "it is recorded": "vmkeep.catalog.images:add return",
    "the last is recorded": "vmkeep.catalog.images:add return 2",
}
QUICK = {"delete": "the newest source is gone", "prune": "its result is stored", "rebuild": "in its record"}
"""For `make test`: where most is left half done."""


def seven_nights(site) -> dict[str, bytes]:
    truth = {}
    counter = itertools.count()
    for reset in ((), (), ("--reset",), (), ("--reset",), (), ()):
        number = next(counter)
        site.write(WEB, "vda", 70_000 * number, b"night %03d " % number * 3000)
        taken = site.run("backup", "web1", "--json", *reset).json
        truth[taken["point"]] = bytes(site.guest(WEB).disks["vda"])
    return truth


class Tidy:
    """A site with three images of one VM, and what its disk held at each point."""

    def __init__(self, site, truth: dict[str, bytes]) -> None:
        self.site = site
        self.truth = truth

    def kill(self, step: str, *arguments: str) -> None:
        step, _, passed = step.partition(" return ")
        environment = {
            **os.environ,
            "PYTHONPATH": self.site.paths,
            "VMKEEP_CONFIG": str(self.site.config),
            "LAB_PASS": passed or "0",
        }
        if passed:
            step = f"{step} return"
        command = [sys.executable, "-m", "lab.kill_at", step, "vmkeep", *arguments]
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert child.returncode == -signal.SIGKILL, f"{step} was not reached: {child.stdout}{child.stderr}"

    def images(self) -> list[dict]:
        listed = self.site.run("image", "list", "--json").json
        return [self.site.run("image", "show", str(one["id"]), "--json").json for one in listed]

    def shown(self) -> list[dict]:
        return [{key: value for key, value in one.items() if key != "state"} for one in self.images()]

    def restorable(self) -> set[str]:
        """The points that restore, each compared with what the guest held then."""
        found = set()
        for image in self.images():
            for one in image["increments"]:
                to = self.site.folder / "to"
                shutil.rmtree(to, ignore_errors=True)
                options = ("--disk", "vda", "--format", "raw", "--name", "x", "--to", str(to))
                told = self.site.run("restore", str(image["id"]), "--increment", str(one["id"]), *options)
                if told.code == 0:
                    assert (to / "x-disk-vda.raw").read_bytes() == self.truth[one["point"]], one
                    found.add(one["point"])
        return found

    def clean(self) -> None:
        """The catalog and the datastore hold the same."""
        checked = self.site.run("catalog", "check", "--json")
        assert checked.code == 0, checked.out
        assert json.loads(checked.out)["unused"] == []
        listed = {one["source"] for image in self.images() for one in image["increments"]}
        assert {path.name for path in self.site.store.iterdir() if path.is_dir()} == listed
        assert self.site.run("recover").code == 0
        assert list((self.site.state / "runs").iterdir()) == [], "the folders of killed commands"


@pytest.fixture
def tidy(site, once) -> Tidy:
    return Tidy(site, once(site, seven_nights))


def deleted(tidy: Tidy, step: str) -> None:
    others = {one["point"] for image in tidy.images() if image["id"] != 1 for one in image["increments"]}
    tidy.kill(step, "image", "delete", "1", "--yes")
    assert tidy.restorable() >= others
    if any(image["id"] == 1 for image in tidy.images()):
        assert tidy.site.run("image", "delete", "1", "--yes").code == 0
    assert [image["id"] for image in tidy.images()] == [2, 3]
    backed_up(tidy)
    assert tidy.restorable() > others


def pruned(tidy: Tidy, step: str) -> None:
    for options in (("--keep-last", "2"), ("--keep-chains", "1")):
        assert tidy.site.run("vm", "updateconf", "web1", *options).code == 0
    stay = [one["point"] for image in tidy.images()[1:] for one in image["increments"]]
    stay.remove(tidy.images()[2]["increments"][0]["point"])
    tidy.kill(step, "image", "prune")
    assert tidy.restorable() >= set(stay)
    assert tidy.site.run("image", "prune").code == 0
    assert [image["id"] for image in tidy.images()] == [2, 3]
    assert [(one["id"], one["type"]) for one in tidy.images()[1]["increments"]] == [(1, "F"), (2, "I")]
    tidy.clean()
    assert tidy.restorable() == set(stay)
    backed_up(tidy)


def rebuilt(tidy: Tidy, step: str) -> None:
    before = tidy.shown()
    shutil.rmtree(tidy.site.state)
    tidy.kill(step, "catalog", "rebuild", "nas")
    assert tidy.site.run("catalog", "rebuild", "nas").code == 0
    assert tidy.shown() == before
    assert tidy.restorable() == set(tidy.truth)
    tidy.clean()


def backed_up(tidy: Tidy) -> None:
    """The VM's next backup builds on what is there."""
    tidy.site.write(WEB, "vda", 0, b"later")
    taken = tidy.site.run("backup", "web1", "--json").json
    assert (taken["image"], taken["type"]) == (3, "INCREMENT")
    tidy.truth[taken["point"]] = bytes(tidy.site.guest(WEB).disks["vda"])
    tidy.clean()


KINDS: dict[str, tuple[dict[str, str], Callable[[Tidy, str], None]]] = {
    "delete": (DELETE, deleted),
    "prune": (PRUNE, pruned),
    "rebuild": (REBUILD, rebuilt),
}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_named_steps(tidy: Tidy, kind: str):
    steps, case = KINDS[kind]
    case(tidy, steps[QUICK[kind]])


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, (steps, _) in KINDS.items() for name in steps])
def test_killed_at_every_step(tidy: Tidy, kind: str, name: str):
    steps, case = KINDS[kind]
    case(tidy, steps[name])
