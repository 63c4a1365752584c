"""kill -9 of vmkeep at every named step of a backup, then: the guest runs, the next backup works, all restores equal.

The steps are functions of the product, told by Python's profiler (`lab.kill_at`); one that is never reached, since it
was renamed or is not called any more, turns a test red.
"""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import libvirt_qemu
import pytest

from backupcore_libvirt.apparmor import denies_merges
from backupcore_libvirt.connection import Connection
from backupcore_libvirt.versions import survives_clients_of_iothreads
from lab.domain_xml import DiskSpec
from lab.host import RUNNING, Host, processes, wait_until
from lab.loop import loop_device

MIB = 1 << 20
pytestmark = pytest.mark.timeout(600)  # several backups each; on a loaded machine they take their time

STEPS = {
    "the VM is locked": "vmkeep.recovery:put_right call",
    "the plan is made": "backupcore.chain:plan return",
    "the run is written down": "vmkeep.catalog.runs:begin return",
    "its folder is made": "vmkeep.folders:dump_run call",
    "the datastore is ready": "lab.store:Folder.prebackup return",
    "scratch is being made": "backupcore_libvirt.folder:RunFolder._locked call",
    "scratch is made": "backupcore_libvirt.folder:RunFolder.make return",
    "before the instant": "backupcore_libvirt.connection:Domain.begin_backup call",
    "the instant": "backupcore_libvirt.connection:Domain.begin_backup return",
    "before the reader is asked": "backupcore.disk.reader.reader:Reader.call call",
    "the reader has answered": "backupcore.disk.reader.reader:Reader.call return",
    "a disk is mapped": "backupcore_libvirt.reading.taken:taken_of return",
    "all is prepared": "backupcore_libvirt.plugin:Libvirt.prebackup return",
    "before the datastore stores": "lab.store:Folder.backup call",
    "reading": "backupcore.disk.reader.remote:RemoteDisk.read return",
    "stored": "backupcore.datastore:Datastore.backup return",
    "before the record": "vmkeep.catalog.images:record call",
    "in the record": "vmkeep.catalog.images:record return",
    "recorded": "vmkeep.catalog.runs:record return",
    "before the release": "backupcore_libvirt.plugin:Libvirt.postbackup call",
    "before the job is ended": "backupcore_libvirt.connection:Domain.abort_job call",
    "the job is told to end": "backupcore_libvirt.connection:Domain.abort_job return",
    "the job has ended": "backupcore_libvirt.backup_job:end return",
    "scratch is being removed": "backupcore_libvirt.folder:RunFolder._remove call",
    "scratch is removed": "backupcore_libvirt.folder:RunFolder.remove return",
    "checkpoints are tidied": "backupcore_libvirt.checkpoint:tidy return",
    "the guest is released": "backupcore_libvirt.plugin:Libvirt.postbackup return",
    "all is released": "backupcore.datastore:Datastore.postbackup return",
    "its folder is removed": "vmkeep.folders:_remove return",
}
"""What it is called for people, and the step for `lab.kill_at`."""

JOB = {
    "a mark is being made": "backupcore_libvirt.marks:_require_bit call",
    "a mark is made": "backupcore_libvirt.marks:_remove return",
    "a scratch file is being made": "backupcore_libvirt.premade.image:_write call",
    "a scratch file is made": "backupcore_libvirt.premade.image:make_empty return",
    "before the socket is removed": "backupcore_libvirt.place.job_socket:remove_sockets call",
    "the socket is removed": "backupcore_libvirt.place.job_socket:remove_sockets return",
}
"""Those of a backup job beside STEPS."""

SUSPEND = {
    "the freeze is noted": "backupcore_libvirt.freeze_record:write return",
    "before the guest stands still": "backupcore_libvirt.connection:Domain.suspend call",
    "the guest stands still": "backupcore_libvirt.connection:Domain.suspend return",
    "the instant, at rest": "backupcore_libvirt.connection:Domain.begin_backup return",
    "before the guest goes on": "backupcore_libvirt.connection:Domain.resume call",
    "the guest goes on": "backupcore_libvirt.connection:Domain.resume return",
    "the freeze is forgotten": "backupcore_libvirt.freeze_record:remove return",
}
"""Those of FS_FREEZE=SUSPEND."""

OFF = {
    "before changes are tracked": "backupcore_libvirt.stopped:add_bitmaps call",
    "one disk is tracked": "backupcore_libvirt.stopped:_qemu_img return",
    "changes are tracked": "backupcore_libvirt.stopped:add_bitmaps return",
    "a disk is served": "backupcore_libvirt.qemu_nbd:QemuNbd.__enter__ return",
    **{name: step for name, step in STEPS.items() if "Domain." not in step and name != "the job has ended"},
}
"""Those of a VM that is off."""

_SNAPSHOT = {
    "before the new overlays": "backupcore_libvirt.overlay.run:begin call",
    "the instant of the overlays": "backupcore_libvirt.overlay.run:begin return",
    "a frozen layer is served": "backupcore_libvirt.qemu_nbd:QemuNbd.__enter__ return",
    "before the merge": "backupcore_libvirt.overlay.run:settle call",
    "one disk is merged": "backupcore_libvirt.overlay.merge:Merger.merge return",
    "all is merged": "backupcore_libvirt.overlay.run:settle return",
    **{name: step for name, step in STEPS.items() if "Domain." not in step and name != "the job has ended"},
}
SNAPSHOT = {
    "an overlay is made": "backupcore_libvirt.premade.image:make_overlay return",
    "a merge has begun": "backupcore_libvirt.connection:Domain.begin_commit return",
    **_SNAPSHOT,
}
"""Those of INCREMENT_MODE=SNAPSHOT, of a VM that runs."""
SNAPSHOT_OFF = {"an overlay is dropped": "backupcore_libvirt.overlay.merge:Merger._discard return", **_SNAPSHOT}
"""The same of one that is off."""

_OVERLAY = "backupcore_libvirt.overlay"
TEMPORARY = {
    "the overlays are noted": f"{_OVERLAY}.folder:OverlayFolder.note return",
    "an overlay is made": "backupcore_libvirt.premade.image:make_overlay return",
    "all overlays are made": f"{_OVERLAY}.temporary:make return",
    "a checkpoint is made": "backupcore_libvirt.connection:Domain.create_checkpoint return",
    "before the overlays come onto the disks": "backupcore_libvirt.connection:Domain.snapshot call",
    "the instant of the temporary overlays": "backupcore_libvirt.connection:Domain.snapshot return",
    "a file below is served": "backupcore_libvirt.qemu_nbd:QemuNbd.__enter__ return",
    "before the merge": f"{_OVERLAY}.left:settle call",
    "a merge has begun": "backupcore_libvirt.connection:Domain.begin_commit return",
    "before the pivot": "backupcore_libvirt.connection:Domain.pivot call",
    "after the pivot": "backupcore_libvirt.connection:Domain.pivot return",
    "one disk is merged": f"{_OVERLAY}.merge:Merger.merge return",
    "all is merged": f"{_OVERLAY}.left:settle return",
    **{name: step for name, step in STEPS.items() if "Domain." not in step and name != "the job has ended"},
}
"""Those of a running VM that is held by overlays for the time of a run."""

QUICK = ("before the reader is asked", "reading", "in the record")
QUICK_JOB = ("a mark is being made", "a scratch file is made", "before the socket is removed")
QUICK_SUSPEND = ("the instant, at rest",)
QUICK_OFF = ("one disk is tracked",)
QUICK_SNAPSHOT = ("an overlay is made", "the instant of the overlays", "a merge has begun")
QUICK_SNAPSHOT_OFF = ("the instant of the overlays", "an overlay is dropped")
QUICK_TEMPORARY = ("all overlays are made", "the instant of the temporary overlays", "before the pivot")
"""One step of each kind of thing that can be left behind, for `make test`."""


@dataclass(frozen=True)
class Case:
    """One kill: at which step, of a full or an increment, and whether `recover` or the next backup puts it right."""

    step: str
    reset: bool
    recover: bool


def pairs(steps: Sequence[str]) -> list[Case]:
    """Every step, with each value of the others as often as the other."""
    values = itertools.cycle(itertools.product((False, True), (True, False)))
    return [Case(step, reset, recover) for step, (reset, recover) in zip(steps, values, strict=False)]


def every(steps: Iterable[str]) -> list[Case]:
    """Every step with every value of the others."""
    return [Case(*values) for values in itertools.product(steps, (False, True), (True, False))]


@pytest.fixture
def host(make_vm, libvirt_uri: str, vm_folder: Path) -> Host:
    vm = make_vm([DiskSpec(target="vda", size=32 * MIB), DiskSpec(target="vdb", size=16 * MIB + 512)], label="killed")
    return written(Host(vm_folder, vm, libvirt_uri, driver="lab"))


@pytest.fixture
def threaded(make_vm, libvirt_uri: str, vm_folder: Path) -> Iterator[Host]:
    """A host whose VM has its disks on an I/O thread: a file, and a block device."""
    size = 16 * MIB + 512
    with loop_device(vm_folder / "loop", bytes(size)) as device:
        disks = [
            DiskSpec(target="vda", size=32 * MIB, driver="iothread='1'"),
            DiskSpec(target="vdb", size=size, format="raw", device=device, driver="iothread='1'"),
        ]
        vm = make_vm(disks, label="threaded", iothreads=1)
        yield written(Host(vm_folder, vm, libvirt_uri, driver="lab"))
        vm.destroy()  # before its device goes


def written(host: Host) -> Host:
    host.vm.io("vda", "write -P 0x55 1M 8M")
    host.vm.io("vdb", "write -P 0x11 0 2M")
    return host


def write(host: Host, number: int) -> None:
    """What tells this round's disks from every other's: data, zeroes, a discard, on both disks."""
    commands = {
        "vda": [
            f"write -P {number % 250 + 1} {number % 30}M 512k",
            f"write -z {(number + 7) % 30}M 256k",
            f"discard {(number + 13) % 30}M 1M",
        ],
        "vdb": [f"write -P {number % 250 + 2} {number % 15}M 640k"],
    }
    for disk, pieces in commands.items():
        if host.vm.active:
            host.vm.io(disk, *pieces)
        else:
            arguments = [argument for piece in pieces for argument in ("-c", piece)]
            subprocess.run(
                ["qemu-io", "-f", "qcow2", *arguments, str(host.vm.disk(disk))], check=True, capture_output=True
            )


def nodes_left(host: Host) -> list[str]:
    """The block nodes of ours in the guest's QEMU, beside which it takes no internal snapshot."""
    if not host.vm.active:
        return []
    answer = json.loads(libvirt_qemu.qemuMonitorCommand(host.vm.domain, '{"execute": "query-named-block-nodes"}', 0))
    return [node["node-name"] for node in answer["return"] if node["node-name"].startswith("backupcore-")]


def matrix(host: Host, steps: Mapping[str, str], cases: Sequence[Case]) -> None:
    truths: dict[str, dict[str, Path]] = {}

    def note(truth: dict[str, Path]) -> None:
        # A run that was killed may have been recorded before: it then holds the same bytes as the next.
        for one in host.recorded():
            truths.setdefault(one.point, truth)

    def goes_on(case: Case) -> None:
        if host.vm.active:
            wait_until(lambda: host.vm.domain.state()[0] == RUNNING, f"the guest to run: {case}")
            host.vm.io("vda", "read 0 4k")  # the guest's disk answers

    first = host.note_truth("first")
    host.backup()
    note(first)
    for number, case in enumerate(cases):
        write(host, number)
        truth = host.note_truth(str(number))
        before = len(host.recorded())
        killed = host.run("backup", host.vm.name, *(["--reset"] if case.reset else []), at=steps[case.step])
        assert killed.code == -signal.SIGKILL, f"{case}: the step was not reached: {killed.err}"
        wait_until(lambda: not processes(str(host.folder)), f"its children to end: {case}")
        goes_on(case)
        assert nodes_left(host) == [], case
        note(truth)
        write(host, number + 100)
        later = host.note_truth(f"{number}-next")
        if case.recover:
            done = host.run("recover", host.vm.name)
            assert done.code == 0, f"{case}: {done.err}"
            assert host.left() == [], case
            again = host.run("recover", host.vm.name)
            assert again.out == "nothing to put right\n", f"{case}: {again.out}"
        taken = host.backup()
        truths[taken["point"]] = later
        note(truth)  # what the killed run had stored may have been recorded by the next
        assert host.left() == [], case
        assert len(host.overlays()) <= 2, f"{case}: {host.overlays()}"
        goes_on(case)
        assert len(host.recorded()) - before in (1, 2), case
        assert taken["type"] == "INCREMENT", f"{case}: {taken['reason']}"
    for one in host.recorded():
        assert host.differing(one.image, one.id, truths[one.point]) == [], one


def test_killed_at_named_steps(host: Host):
    matrix(host, {**STEPS, **JOB}, pairs([*QUICK, *QUICK_JOB]))


def test_killed_while_the_guest_is_suspended(host: Host):
    host.ask("vm", "updateconf", host.vm.name, "--fs-freeze", "SUSPEND")
    matrix(host, SUSPEND, pairs(QUICK_SUSPEND))


def test_killed_while_a_vm_that_is_off_is_read(host: Host):
    host.vm.destroy()
    matrix(host, OFF, pairs(QUICK_OFF))
    host.vm.start()
    assert host.backup()["type"] == "INCREMENT"


def snapshot_mode(host: Host) -> None:
    host.ask("vm", "updateconf", host.vm.name, "--increment-mode", "SNAPSHOT")


def piles_up(host: Host) -> bool:
    """Whether AppArmor keeps the running VM from INCREMENT_MODE=SNAPSHOT."""
    with Connection(host.uri) as connection:
        return denies_merges(connection, connection.domain(host.vm.uuid))


def test_killed_in_snapshot_mode(host: Host):
    snapshot_mode(host)
    if piles_up(host):
        host.vm.destroy()
        matrix(host, SNAPSHOT_OFF, pairs(QUICK_SNAPSHOT_OFF))
    else:
        matrix(host, SNAPSHOT, pairs(QUICK_SNAPSHOT))
    assert len(host.overlays()) == 2, "one for each disk"


def dies_of_a_client(host: Host) -> bool:
    """Whether this QEMU is one whose VMs with I/O threads are held by overlays."""
    with Connection(host.uri) as connection:
        return not survives_clients_of_iothreads(connection.qemu_version())


def test_killed_while_a_vm_with_an_io_thread_is_held(threaded: Host):
    before = threaded.vm.domain.ID()
    steps, quick = (TEMPORARY, QUICK_TEMPORARY) if dies_of_a_client(threaded) else (STEPS, QUICK)
    matrix(threaded, steps, pairs(quick))
    assert threaded.overlays() == []
    assert threaded.vm.domain.ID() == before, "its QEMU has not died"


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_killed_at_every_step_while_a_vm_with_an_io_thread_is_held(threaded: Host):
    before = threaded.vm.domain.ID()
    steps = TEMPORARY if dies_of_a_client(threaded) else STEPS
    matrix(threaded, steps, every(steps))
    assert threaded.overlays() == []
    assert threaded.vm.domain.ID() == before, "its QEMU has not died"


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_killed_at_every_step_of_snapshot_mode(host: Host):
    snapshot_mode(host)
    if not piles_up(host):  # else it is as with the VM off, which has a test of its own
        matrix(host, SNAPSHOT, every(SNAPSHOT))


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_killed_at_every_step_of_snapshot_mode_with_the_vm_off(host: Host):
    host.vm.destroy()
    snapshot_mode(host)
    matrix(host, SNAPSHOT_OFF, every(SNAPSHOT_OFF))
    host.vm.start()
    assert host.backup()["type"] == "INCREMENT"
    assert len(host.overlays()) == 2, "one for each disk"


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_killed_at_every_step(host: Host):
    matrix(host, {**STEPS, **JOB}, every([*STEPS, *JOB]))


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_killed_at_every_step_of_a_suspension(host: Host):
    host.ask("vm", "updateconf", host.vm.name, "--fs-freeze", "SUSPEND")
    matrix(host, SUSPEND, every(SUSPEND))


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_killed_at_every_step_with_the_vm_off(host: Host):
    host.vm.destroy()
    matrix(host, OFF, every(OFF))
