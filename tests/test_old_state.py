"""Catalogs that are behind their datastore, with real VMs: an old state folder, a drill elsewhere, another libvirtd.

Each ends with every increment in the datastore restorable, and with a next backup that is an increment of the right
parent, or a full that says why.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import libvirt
import pytest

from lab.domain_xml import DiskSpec
from lab.host import Host
from lab.private_libvirtd import PrivateLibvirtd
from lab.vm import VM

MIB = 1 << 20
pytestmark = pytest.mark.timeout(600)  # for a loaded machine

Truths = dict[str, dict[str, Path]]


@pytest.fixture(params=[pytest.param("restic", marks=pytest.mark.soak), "rsync"])
def hosts(request: pytest.FixtureRequest, make_vm, libvirt_uri: str, vm_folder: Path) -> tuple[Host, Host]:
    """Two state folders of one VM and one datastore."""
    vm = make_vm([DiskSpec(target="vda", size=8 * MIB)], label="old")
    options = {"rsync": {"target": f"{vm_folder}/store"}, "restic": {"repository": f"{vm_folder}/store"}}
    made = []
    for name in ("a", "b"):
        folder = vm_folder / name
        folder.mkdir(mode=0o711)
        made.append(Host(folder, vm, libvirt_uri, driver=request.param, options=options[request.param]))
    if request.param == "rsync":
        (vm_folder / "store").mkdir()
    return made[0], made[1]


def night(host: Host, truths: Truths, number: int, code: int = 0) -> dict:
    """Something is written, and backed up."""
    host.vm.io("vda", f"write -P {number + 1} {number % 7}M 1M")
    truth = host.note_truth(f"{host.folder.name} {number}")
    done = host.run("--json", "backup", host.vm.name)
    assert done.code == code, done.err
    made = json.loads(done.out)
    truths[made["point"]] = truth
    return made


def check(host: Host, truths: Truths) -> None:
    """Every increment of the catalog restores to its truth, and it knows all that is in the datastore."""
    for image in host.ask("image", "list"):
        for one in host.ask("image", "show", str(image["id"]))["increments"]:
            assert host.differing(image["id"], one["id"], truths[one["point"]]) == [], one
    assert host.ask("catalog", "check")["missing"] == []
    assert host.ask("catalog", "check")["unused"] == []


@pytest.mark.parametrize("hosts", ["rsync"], indirect=True)
def test_a_state_folder_of_last_night_and_a_drill_on_another_host(hosts: tuple[Host, Host]):
    first, second = hosts
    truths: Truths = {}
    first.ask("vm", "updateconf", first.vm.name, "--keep-last", "3")
    for number in range(3):
        night(first, truths, number)
    assert len(second.ask("catalog", "rebuild", "nas")["added"]) == 1
    shutil.copytree(first.state, first.folder / "last night")
    night(first, truths, 3)
    # The drill's catalog is behind: it says so, reads nothing old, and gets what it lacks.
    old = second.run("restore", "1", "--to", str(second.folder / "drill"))
    assert (old.code, "vmkeep catalog rebuild nas" in old.err) == (4, True)
    assert second.run("image", "verify", "1").code == 3
    changed = second.ask("catalog", "rebuild", "nas")["changed"]
    assert [(one["merged"], one["into"], one["added"]) for one in changed] == [([0, 1], 1, [3])]
    check(second, truths)
    assert second.run("image", "delete", "1", "--yes").code == 9
    # So is the state folder that is put back.
    shutil.rmtree(first.state)
    (first.folder / "last night").rename(first.state)
    made = night(first, truths, 4, code=3)
    assert (made["type"], "which this catalog does not know" in made["reason"]) == ("FULL", True)
    first.ask("catalog", "rebuild", "nas")
    made = night(first, truths, 5)
    assert (made["type"], made["warnings"]) == ("INCREMENT", [])
    check(first, truths)
    assert first.left() == []


def test_backups_that_others_removed_or_gave_another_name(hosts: tuple[Host, Host]):
    host, _ = hosts
    truths: Truths = {}
    for number in range(3):
        night(host, truths, number)
    tokens = [one["source"] for one in host.ask("image", "show", "1")["increments"]]
    store = Path(next(iter(host.options.values())))

    def restic(*arguments: str) -> None:
        command = ["restic", "--repo", str(store), "--password-file", f"{host.folder}/password", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    if host.driver == "restic":
        restic("tag", "--add", "keep", tokens[0], tokens[2])
        assert night(host, truths, 3)["type"] == "INCREMENT"
        now = [one["source"] for one in host.ask("image", "show", "1")["increments"]]
        assert (now[0] == tokens[0], now[1] == tokens[1], now[2] == tokens[2]) == (False, True, False)
        check(host, truths)
        restic("forget", tokens[1])
    else:
        shutil.rmtree(store / tokens[1].replace(".", "/"))
    made = night(host, truths, 4, code=3)
    assert (made["type"], "increment 1 of image 1" in made["reason"]) == ("FULL", True)
    assert [one["state"] for one in host.ask("image", "list")] == ["damaged", "open"]
    assert night(host, truths, 5)["type"] == "INCREMENT"
    if host.driver == "rsync":
        full = host.ask("image", "show", "2")["increments"][0]["source"]
        (store / full.replace(".", "/") / "disk.vda.qcow2").unlink()
        made = night(host, truths, 6, code=3)
        assert (made["type"], "is not whole any more" in made["reason"]) == ("FULL", True)
        return
    for image, increment in ((1, 0), (2, 0), (2, 1)):
        point = host.ask("image", "show", str(image))["increments"][increment]["point"]
        assert host.differing(image, increment, truths[point]) == []


@contextmanager
def moved(vm: VM, uri: str) -> Iterator[None]:
    """The VM, undefined where it is and defined on another libvirtd, running; and back."""
    home, domain = vm.connection, vm.domain
    xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    _undefine(vm)
    with closing(libvirt.open(uri)) as connection:
        vm.connection, vm.domain = connection, connection.defineXML(xml)
        vm.start()
        try:
            yield
        finally:
            _undefine(vm)
            vm.connection, vm.domain = home, home.defineXML(xml)
    vm.start()


def _undefine(vm: VM) -> None:
    vm.destroy()
    vm.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)


@pytest.mark.skipif(os.geteuid() != 0, reason="a second libvirtd needs root")
@pytest.mark.parametrize("hosts", ["rsync"], indirect=True)
def test_one_vm_in_turns_on_two_libvirtds(hosts: tuple[Host, Host], vm_folder: Path):
    """Its disks and their bitmaps travel, libvirt's records do not."""
    first, second = hosts
    truths: Truths = {}
    first.ask("vm", "updateconf", first.vm.name, "--keep-last", "3")
    with PrivateLibvirtd(vm_folder / "second") as daemon:
        second.uri = daemon.uri
        second.configure()
        for turn in range(2):
            for at in range(2):
                made = night(first, truths, 10 * turn + at)
                assert (made["type"], made["warnings"]) == ("INCREMENT" if turn or at else "FULL", [])
            with moved(first.vm, daemon.uri):
                for at in range(2):
                    made = night(second, truths, 10 * turn + at + 5)
                    assert (made["type"], made["warnings"]) == ("INCREMENT" if turn or at else "FULL", [])
        assert night(first, truths, 30)["type"] == "INCREMENT"
        second.ask("catalog", "rebuild", "nas")
        check(second, truths)
