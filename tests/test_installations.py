"""Two configurations on one VM, night after night, with real libvirt and a datastore that both use."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path

import pytest

from lab.domain_xml import DiskSpec
from lab.host import Host, stopped, wait_until
from tests.test_killed import STEPS

MIB = 1 << 20
pytestmark = pytest.mark.timeout(600)  # for a loaded machine


@pytest.fixture
def both(make_vm, libvirt_uri: str, vm_folder: Path) -> tuple[Host, Host]:
    """One VM, one store, two state folders."""
    vm = make_vm([DiskSpec(target="vda", size=16 * MIB), DiskSpec(target="vdb", size=8 * MIB)], label="two")
    made = []
    for name in ("a", "b"):
        folder = vm_folder / name
        folder.mkdir(mode=0o711)
        made.append(Host(folder, vm, libvirt_uri, driver="rsync", options={"target": f"{vm_folder}/store"}))
    (vm_folder / "store").mkdir()
    made[0].ask("vm", "updateconf", vm.name, "--keep-last", "2")
    return made[0], made[1]


def sources(host: Host) -> set[str]:
    return {
        one["source"]
        for image in host.ask("image", "list")
        for one in host.ask("image", "show", str(image["id"]))["increments"]
    }


def stored(host: Host) -> set[str]:
    found = Path(host.options["target"]).glob("*/*/manifest.json")
    return {f"{path.parent.parent.name}.{path.parent.name}" for path in found}


def test_nightly_in_turn_and_at_once(both: tuple[Host, Host]):
    truths: dict[str, dict[str, Path]] = {}
    vm = both[0].vm
    for night in range(4):
        vm.io("vda", f"write -P {night + 1} {night}M 1M")
        for host in both:
            truth = host.note_truth(str(night))
            done = host.backup()
            truths[done["point"]] = truth
            assert done["type"] == ("INCREMENT" if night else "FULL")
            assert done["warnings"] == []
            assert host.left() == []
        if night == 2:
            vm.destroy()
            vm.start()
    # One begins while the other one reads: it is refused, and touches nothing.
    first, second = both
    vm.io("vda", "write -P 0x77 9M 1M")
    truth = first.note_truth("at once")
    process = first.start("--json", "backup", vm.name, at=STEPS["reading"], stop=True)
    try:
        wait_until(partial(stopped, process.pid), "the middle of a backup")
        before, kept = first.checkpoints(), stored(first)
        refused = second.run("backup", vm.name)
        assert (refused.code, "another job is running" in refused.err) == (10, True), refused.err
        assert (first.checkpoints(), stored(first)) == (before, kept)
    finally:
        process.send_signal(signal.SIGCONT)
    done = first.end(process)
    assert done.code == 0, done.err
    truths[json.loads(done.out)["point"]] = truth
    for host in both:
        assert host.backup()["type"] == "INCREMENT"
        assert len(host.recorded()) == 2
        assert host.left() == []
    assert stored(first) == sources(first) | sources(second)
    assert not sources(first) & sources(second)
    for host in both:
        for one in host.recorded():
            if one.point in truths:
                assert host.differing(one.image, one.id, truths[one.point]) == []
        last = host.recorded()[-1]
        assert host.differing(last.image, last.id, first.note_truth(f"last {host.folder.name}")) == []
