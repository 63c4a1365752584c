"""``vmkeep cancel`` of a backup of a real VM, told while the backup stands at a given step."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from lab.domain_xml import DiskSpec
from lab.host import RUNNING, Host, stopped, wait_until
from tests.test_killed import STEPS

MIB = 1 << 20
pytestmark = pytest.mark.timeout(600)  # for a loaded machine


@pytest.fixture
def host(make_vm, libvirt_uri: str, vm_folder: Path) -> Host:
    vm = make_vm([DiskSpec(target="vda", size=32 * MIB)], label="cancel")
    vm.io("vda", "write -P 0x55 1M 8M")
    return Host(vm_folder, vm, libvirt_uri, driver="lab")


def test_cancel_at_named_steps_leaves_all_as_it_was(host: Host):
    done = host.backup()
    checkpoints, sources = host.checkpoints(), sorted((host.folder / "store").iterdir())
    for name in ("before the instant", "before the reader is asked", "a disk is mapped", "reading"):
        # Enough to read that the cancel comes before the record, also where its thread gets the processor late.
        host.vm.io("vda", "write -P 0x77 1M 30M")
        process = host.start("backup", host.vm.name, at=STEPS[name], stop=True)
        wait_until(partial(stopped, process.pid), name)
        canceller = host.start("--json", "cancel", host.vm.name)
        # One that is stopped is told to go on, so that it hears of it.
        told = host.end(canceller).json
        assert (told["process"], told["doing"], told["state"]) == (process.pid, "a backup", "cancelled"), name
        assert host.end(process).code == 130, name
        assert host.left() == [], name
        assert host.vm.domain.state()[0] == RUNNING, name
        assert host.checkpoints() == checkpoints, name
        assert sorted((host.folder / "store").iterdir()) == sources, name
        assert host.run("recover", host.vm.name).out == "nothing to put right\n", name
    host.vm.io("vda", "write -P 0x66 3M 1M")
    truth = host.note_truth("after")
    taken = host.backup()
    assert (taken["type"], taken["parent"]) == ("INCREMENT", done["increment"])
    assert host.differing(taken["image"], taken["increment"], truth) == []
    told = host.run("cancel", host.vm.name)
    assert (told.code, told.err.splitlines()[0]) == (4, f"vmkeep: no backup of VM {host.vm.name} is running")
