"""kill -9 of what reads from a mounted restic repository: nothing stays that `vmkeep recover` does not remove."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from lab.domain_xml import DiskSpec
from lab.host import Host, processes, wait_until

MIB = 1 << 20
MOUNTING = "backupcore_restic.mount:Mount._until_mounted call"
MOUNTED = "backupcore_restic.mount:Mount._until_mounted return"
READING = "backupcore_restic.mounted:Mounted.read_into return"
STORING = "backupcore.proof:prove call"
VERBS = {
    "restore": (["restore", "1", "--to"], [MOUNTING, MOUNTED, READING]),
    "verify": (["image", "verify", "1"], [READING]),
    "flatten": (["image", "flatten", "1"], [READING, STORING]),
}


@pytest.mark.timeout(600)  # restic takes a second for each command, and more on a loaded machine
def test_killed_at_named_steps(make_vm, libvirt_uri: str, vm_folder: Path, require_programs) -> None:
    require_programs("restic", "fusermount3")
    vm = make_vm([DiskSpec(target="vda", size=16 * MIB)], label="reading")
    host = Host(vm_folder, vm, libvirt_uri)
    for number in range(3):
        vm.io("vda", f"write -P {number + 1} {number}M 2M")
        truth = host.note_truth(str(number))
        host.backup()
    for verb, (arguments, steps) in VERBS.items():
        for step in steps:
            case = f"{verb} at {step}"
            more = [str(vm_folder / "killed")] if verb == "restore" else []
            killed = host.run(*arguments, *more, at=step)
            assert killed.code == -signal.SIGKILL, f"{case}: the step was not reached: {killed.err}"
            wait_until(lambda: not processes(str(host.folder)), f"its children to end: {case}")
            done = host.run("recover", vm.name)
            assert done.code == 0, f"{case}: {done.err}"
            # The checkpoint of a point that a flatten has merged goes with the next backup, killed or not.
            assert [left for left in host.left() if not left.startswith("checkpoint ")] == [], case
    assert host.ask("image", "verify", "1")
    last = host.recorded()[-1]
    assert host.differing(last.image, last.id, truth) == []
