"""VMs that are held by an overlay on each disk for the time of a run: with an I/O thread, in a QEMU that a backup job
would kill. The bytes are compared with what QEMU's own tools copied.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import libvirt
import pytest

from backupcore.context import Context
from backupcore.disk.nbd import ConnectionLost
from backupcore.errors import BackupError, Busy, HypervisorError, IncrementImpossible, TargetFull, UnsupportedOperation
from backupcore.model import RunState
from backupcore_libvirt.apparmor import denies_merges
from backupcore_libvirt.connection import Connection, Domain
from backupcore_libvirt.image_lock import keep_closed
from backupcore_libvirt.mechanisms import choice
from backupcore_libvirt.mechanisms.temporary_overlays import TemporaryOverlays
from backupcore_libvirt.overlay.merge import Merger
from backupcore_libvirt.overlay.room import Growing, require_room, too_full
from backupcore_libvirt.overlay.stack import overlay_path
from backupcore_libvirt.premade.image import make_overlay
from backupcore_libvirt.release.guard import Guard

MiB = 1 << 20


def overlays(vm) -> list[Path]:
    """The overlays that lie beside its disks."""
    return sorted(path for path in vm.folder.iterdir() if "backupcore" in path.name)


def life(vm) -> int:
    """libvirt's number of the running VM: another one where its QEMU has died meanwhile."""
    return vm.domain.ID()


@pytest.fixture(autouse=True)
def every_qemu_dies(monkeypatch) -> None:
    """This one counts as one that a backup job would kill, so that these tests say the same on every host."""
    monkeypatch.setattr(choice, "survives_clients_of_iothreads", lambda _: False)


@pytest.fixture
def take(runs, tmp_path):
    """One backup, held open for the block, then kept in a folder: (taken, its layer)."""

    def one(vm, parent=None, during=lambda: None, **more):
        run = runs.run(vm, parent, **more)
        with runs.take(run) as taken:
            during()
            return taken, runs.keep(taken, tmp_path / run.id)

    return one


def plain(vm) -> None:
    """At rest: no overlay, no job, each disk on its own file, by both definitions, and the guest runs."""
    assert overlays(vm) == []
    for disk in vm.targets():
        assert vm.disk(disk).name in (f"{disk}.qcow2", f"{disk}.raw")
        assert not vm.active or vm.domain.blockJobInfo(disk, 0) == {}
        assert str(vm.disk(disk)) in vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    assert not vm.active or vm.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING


def test_full_and_increments(lab, take, same, tmp_path):
    vm = lab.vm(["qcow2:64", "raw:9"], iothread="disk")
    vm.io("vda", "write -P 0x11 0 8M", "write -P 0x12 30M 1M")
    vm.io("vdb", "write -P 0x13 1M 1M")
    before, layers, parent = life(vm), [], None
    changes = [
        [],
        ["write -P 0x21 1M 64k", "write -z 2M 1M", "write -z -u 4M 1M", "discard 6M 1M", "write -P 0x22 40000k 512"],
        ["write -P 0x31 2500k 128k", "write -P 0x32 30M 4k"],
    ]

    def during() -> None:
        # What the guest writes from here on is no part of the backup, and part of the next one.
        assert [path.suffixes[-2:] for path in overlays(vm)] == [[".temporary", ".qcow2"]] * 2
        vm.io("vda", "write -P 0x77 0 64k", "discard 7M 64k", "write -z 20M 64k")
        vm.io("vdb", "write -P 0x78 0 64k")

    for number, change in enumerate(changes):
        for command in change:
            vm.io("vda", command)
        truth = vm.copy_truth(tmp_path / f"truth{number}")
        parent, layer = take(vm, parent, during)
        layers.append(layer)
        same(layers, truth)
        assert [(disk.whole, disk.path) for disk in parent.prepared.disks] == [
            (number == 0, str(vm.folder / "vda.qcow2")),
            (True, str(vm.folder / "vdb.raw")),
        ]
        plain(vm)
    assert life(vm) == before
    held = parent.prepared.artifacts[0].layout
    assert sum(extent.length for extent in held.extents()) <= 7 * 65536, "what changed, and no more"


def test_nobody_is_connected_to_qemu(lab, runs):
    """That is what would kill it: the run's sockets are those of qemu-nbd, and no job is there."""
    vm = lab.vm(["qcow2:8"], iothread="disk")
    run = runs.run(vm)
    with runs.take(run):
        assert {path.name for path in (runs.hypervisor.scratch / run.id).iterdir()} == {"lock", "nbd.vda.sock"}
        assert vm.job() == 0
        assert vm.monitor("query-block-exports") == []


def test_all_disks_show_one_instant_of_a_guest_that_writes(counting_vm, runs, restored, tmp_path, wait_for):
    vm = counting_vm(iothread="disk")
    parent, layers, seen = None, [], 0
    for number in range(3):
        before = vm.domain.blockStats("vdb")[2]
        wait_for(lambda before=before: vm.domain.blockStats("vdb")[2] > before + 10, "the guest writes", 60)
        state = RunState.FAILED if number == 1 else RunState.RECORDED
        with runs.take(runs.run(vm, parent), state=state) as taken:
            if state is RunState.RECORDED:
                layers.append(runs.keep(taken, tmp_path / f"layer{number}"))
                parent = taken
        if state is not RunState.RECORDED:
            continue
        disks = [restored([layer[disk] for layer in layers], tmp_path / disk) for disk in ("vda", "vdb")]
        first, second = (int.from_bytes(disk.read_bytes()[MiB : MiB + 4], "little") for disk in disks)
        assert first - second in (0, 1), "the second disk is at most one write behind the first"
        assert second > seen
        seen = second
    plain(vm)


def test_a_chain_goes_on_with_a_backup_job_and_while_the_vm_is_off(lab, take, same, monkeypatch, tmp_path):
    """The bitmaps are the same: QEMU is upgraded, the I/O thread goes and comes, the VM is off."""
    vm = lab.vm(["qcow2:16"], iothread="disk")
    thread = "iothread='1'"
    layers, parent = [], None

    def increment(number: int, how: str) -> None:
        nonlocal parent
        vm.write("vda", f"write -P {number + 1} {number}M 64k")
        truth = vm.copy(tmp_path / f"truth{number}")
        seen = []

        def during() -> None:
            seen.append((vm.job() != 0) if vm.active else "off")
            if vm.active:
                vm.write("vda", f"write -P {number + 100} {number + 8}M 64k")

        parent, layer = take(vm, parent, during)
        layers.append(layer)
        same(layers, truth)
        assert seen == [{"job": True, "overlay": False, "off": "off"}[how]]
        assert [disk.whole for disk in parent.prepared.disks] == [number == 0]

    def switch(*pieces: tuple[str, str]) -> None:
        vm.destroy()
        vm.change(*pieces)
        vm.start()

    increment(0, "overlay")
    switch((thread, ""))
    increment(1, "job")
    increment(2, "job")
    switch(("<driver name='qemu' type='qcow2' discard='unmap'/>", f"<driver name='qemu' type='qcow2' {thread}/>"))
    increment(3, "overlay")
    vm.destroy()
    increment(4, "off")
    vm.start()
    increment(5, "overlay")
    plain(vm)


def test_a_comparison_with_the_last_backup(lab, take, runs, tmp_path):
    """What `vmkeep vm compare` asks: no NBD client on the VM's QEMU either, and no checkpoint."""
    vm = lab.vm(["qcow2:16", "raw:8"], iothread="disk")
    vm.io("vda", "write -P 1 0 4M")
    parent, _ = take(vm)
    vm.io("vda", "write -P 2 1M 64k")
    checkpoints, before = vm.checkpoints(), life(vm)
    run = runs.run(vm, parent)
    with runs.context(run) as ctx, runs.hypervisor.unchanged(run, ["vda", "vdb"], ctx) as (first, second):
        assert len(overlays(vm)) == 1
        extents = [(e.offset, e.length) for e in first.extents if e.kind.name == "DATA"]
        assert extents == [(0, MiB), (MiB + 65536, 3 * MiB - 65536)]
        assert second.why_not.startswith("raw")
    assert (vm.checkpoints(), life(vm)) == (checkpoints, before)
    plain(vm)


# What others do meanwhile


def commit_by_hand(vm, disk: str) -> None:
    """As `virsh blockcommit --active --shallow --pivot`."""
    flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE | libvirt.VIR_DOMAIN_BLOCK_COMMIT_SHALLOW
    vm.domain.blockCommit(disk, None, None, 0, flags)
    deadline = time.monotonic() + 60
    while True:
        found = vm.domain.blockJobInfo(disk, 0)
        with contextlib.suppress(libvirt.libvirtError):  # not ready yet
            if found["cur"] == found["end"]:
                vm.domain.blockJobAbort(disk, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_internal_snapshot_that_was_taken_meanwhile_is_not_destroyed(lab, runs, same, tmp_path):
    vm = lab.vm(["qcow2:16"], iothread="disk")
    with pytest.raises(HypervisorError, match=r"snapshots .*\(mine\)") as told, runs.take(runs.run(vm)):
        vm.io("vda", "write -P 2 2M 1M")
        vm.domain.snapshotCreateXML("<domainsnapshot><name>mine</name></domainsnapshot>", 0)
        vm.io("vda", "write -P 3 2M 1M")
    assert "virsh snapshot-delete" in told.value.hint
    assert len(overlays(vm)) == 1
    with pytest.raises(HypervisorError, match="mine"):
        recover(runs, vm, tmp_path / "early")
    with pytest.raises(HypervisorError, match="mine"), runs.take(runs.run(vm)) as taken:
        truth = vm.copy_truth(tmp_path / "truth")
        same([runs.keep(taken, tmp_path / "layer")], truth)
    assert len(overlays(vm)) == 1
    vm.domain.snapshotLookupByName("mine").delete()
    truth = vm.copy_truth(tmp_path / "after")
    recover(runs, vm, tmp_path / "recover")
    plain(vm)
    with runs.take(runs.run(vm)) as taken:
        same([runs.keep(taken, tmp_path / "last")], truth)


@pytest.mark.parametrize("managed", [True, False], ids=["managed", "to a file"])
def test_a_vm_whose_memory_was_saved_meanwhile_finds_its_disks(lab, runs, same, tmp_path, managed):
    vm = lab.vm(["qcow2:16"], iothread="disk")
    file = vm.folder / "memory"
    with pytest.raises(Busy, match="its memory is saved"), runs.take(runs.run(vm)):
        vm.io("vda", "write -P 2 2M 1M")
        truth = vm.copy_truth(tmp_path / "truth")
        vm.domain.managedSave(0) if managed else vm.domain.save(str(file))
    assert len(overlays(vm)) == 1
    vm.start() if managed else vm.connection.restore(str(file))
    recover(runs, vm, tmp_path / "recover")
    plain(vm)
    with runs.take(runs.run(vm)) as taken:
        same([runs.keep(taken, tmp_path / "layer")], truth)


def test_an_external_snapshot_that_was_taken_meanwhile_is_told(lab, runs, tmp_path):
    vm = lab.vm(["qcow2:16"], iothread="disk")
    xml = f"""<domainsnapshot><disks><disk name='vda' snapshot='external'><source file='{vm.folder / "mine.qcow2"}'/>
        </disk></disks></domainsnapshot>"""
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    with pytest.raises(HypervisorError, match="somebody's snapshot lies on it"), runs.take(runs.run(vm)):
        vm.domain.snapshotCreateXML(xml, flags)
        vm.io("vda", "write -P 3 2M 1M")
    (path,) = overlays(vm)
    assert runs.hypervisor.find(vm.name).remarks == (
        f"somebody's snapshot lies on {path}, which a backup has left, so it is not merged",
    )
    with pytest.raises(HypervisorError, match="somebody's snapshot lies on it"):
        recover(runs, vm, tmp_path / "early")
    commit_by_hand(vm, "vda")
    recover(runs, vm, tmp_path / "recover")
    plain(vm)


@pytest.mark.parametrize("first", ["qcow2", "raw"], ids=["with a checkpoint", "without"])
def test_a_disk_that_was_detached_meanwhile_is_told(lab, runs, first):
    """Its own file lacks what was written during the backup, and looks as if it were all of it."""
    vm = lab.vm([f"{first}:16", "raw:8"], iothread="controller")
    with pytest.raises(HypervisorError, match="a disk was detached during a backup") as told, runs.take(runs.run(vm)):
        with vm.suspended():
            vm.io("vdb", "write -P 5 0 1M")
        root = ElementTree.fromstring(vm.domain.XMLDesc())
        disk = next(one for one in root.iterfind("devices/disk") if one.find("target").get("dev") == "vdb")
        flags = libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG
        vm.domain.detachDeviceFlags(ElementTree.tostring(disk, encoding="unicode"), flags)
    (path,) = overlays(vm)
    assert f"qemu-img commit -f qcow2 {path}" in told.value.hint
    plain_disk = vm.folder / "vdb.raw"
    assert plain_disk.read_bytes()[:MiB] == bytes(MiB)
    subprocess.run(["qemu-img", "commit", "-q", "-f", "qcow2", path], check=True)
    assert plain_disk.read_bytes()[:MiB] == b"\x05" * MiB
    path.unlink()


@pytest.mark.parametrize("what", ["cut off", "FIFO", "link", "folder"])
def test_what_lies_in_the_place_of_an_overlay_hinders_no_backup(lab, runs, what):
    vm = lab.vm(["qcow2:16"], iothread="disk")
    path = Path(overlay_path(str(vm.disk("vda")), "0" * 32, "vda", temporary=True))
    make = {
        "cut off": path.touch,  # whoever made it was killed
        "FIFO": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to("/etc/passwd"),
        "folder": path.mkdir,
    }
    make[what]()
    assert runs.hypervisor.find(vm.name).remarks == ()
    with runs.take(runs.run(vm)):
        pass
    assert overlays(vm) == ([] if what == "cut off" else [path])


# The end of something, in the middle of a run


def readers(folder: Path) -> list[int]:
    """The qemu-nbd processes with a socket in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes()
            if b"qemu-nbd" in line.split(b"\0")[0] and str(folder).encode() in line:
                found.append(int(path.parent.name))
    return found


def test_the_reader_is_killed_and_the_guest_goes_on(lab, runs, take, same, tmp_path):
    vm = lab.vm(["qcow2:16"], iothread="disk")
    before = life(vm)
    parent, layer = take(vm)
    vm.io("vda", "write -P 1 1M 1M")
    run = runs.run(vm, parent)
    with pytest.raises(ConnectionLost), runs.take(run) as taken:
        for process in readers(runs.hypervisor.scratch / run.id):
            os.kill(process, signal.SIGKILL)
        vm.io("vda", "write -P 2 2M 1M")
        runs.keep(taken, tmp_path / "torn")
    assert life(vm) == before
    plain(vm)
    truth = vm.copy_truth(tmp_path / "truth")
    taken, above = take(vm, parent)
    same([layer, above], truth)
    assert not taken.prepared.disks[0].whole


@contextlib.contextmanager
def left_alone(runs, run) -> Iterator[None]:
    """A run whose process is killed, with its guard, while it holds the VM: no `postbackup`, and its folder stays."""
    with runs.context(run) as ctx:
        runs.hypervisor.prebackup(run, ctx)
        yield
        guard = Guard.of(run.id)
        assert guard is not None
        os.kill(guard.process, signal.SIGKILL)
        for thread in threading.enumerate():
            if thread.name == f"guard-{run.id}":  # it does what the guard had to do
                thread.join(60)


def recover(runs, vm, folder: Path) -> tuple[str, ...]:
    folder.mkdir()
    with Context(folder) as ctx:
        runs.hypervisor.recover(vm.identity, (), ctx)
        return ctx.put_right


@pytest.mark.parametrize("again", [False, True], ids=["off", "started-again"])
def test_the_vm_is_switched_off_meanwhile(lab, runs, take, same, tmp_path, again):
    vm = lab.vm(["qcow2:16", "raw:8"], iothread="disk")
    vm.io("vda", "write -P 1 1M 1M")
    truth = vm.copy_truth(tmp_path / "1")

    def during() -> None:
        vm.io("vda", "write -P 2 2M 1M")
        vm.io("vdb", "write -P 3 2M 1M")
        vm.destroy()
        if again:
            vm.start()
            vm.io("vdb", "write -P 4 4M 1M")

    with Connection(runs.hypervisor.uri) as connection:
        closed = again and denies_merges(connection, connection.domain(vm.uuid))
    run = runs.run(vm)
    # The profile of a VM that was started on its overlay keeps it there until it is off.
    told = pytest.raises(HypervisorError, match="AppArmor denies it") if closed else contextlib.nullcontext()
    with told, runs.take(run) as parent:
        during()
        layer = runs.keep(parent, tmp_path / run.id)
    same([layer], truth)
    if closed:
        assert len(overlays(vm)) == 2
        vm.destroy()
        recover(runs, vm, tmp_path / "recover")
    plain(vm)
    truth = vm.copy(tmp_path / "2")
    taken, above = take(vm, parent)
    same([layer, above], truth)
    assert not taken.prepared.disks[0].whole


@pytest.mark.parametrize("end", ["destroy", "kill"])
def test_the_vm_ends_in_the_middle_of_a_merge(lab, runs, same, tmp_path, monkeypatch, end):
    vm = lab.vm(["qcow2:64"], iothread="disk")
    begin, follow = Domain.begin_commit, Merger._follow

    def slow(self, disk, base, top=None) -> None:
        begin(self, disk, base, top)
        vm.domain.blockJobSetSpeed(disk, 1, 0)  # MiB/s

    def follow_to_the_end(self, disk) -> None:
        if vm.active:
            assert vm.domain.blockJobInfo(disk, 0)["cur"] < 30 * MiB
            getattr(vm, end)()
        follow(self, disk)

    monkeypatch.setattr(Domain, "begin_commit", slow)
    monkeypatch.setattr(Merger, "_follow", follow_to_the_end)
    with runs.take(runs.run(vm)):
        vm.io("vda", "write -P 2 10M 30M", "flush")
        truth = vm.copy_truth(tmp_path / "truth")
    assert not vm.active
    plain(vm)
    same([{"vda": vm.disk("vda")}], truth)


def test_qemu_is_killed_meanwhile(lab, runs, take, same, tmp_path):
    vm = lab.vm(["qcow2:16", "raw:8"], iothread="disk")
    full, layer = take(vm)
    vm.io("vda", "write -P 1 1M 1M")
    truth = vm.copy_truth(tmp_path / "1")
    run = runs.run(vm, full)
    with runs.take(run) as taken:
        vm.io("vda", "write -P 2 2M 1M", "flush")
        vm.kill()
        above = runs.keep(taken, tmp_path / "above")
    same([layer, above], truth)
    plain(vm)
    vm.start()
    truth = vm.copy_truth(tmp_path / "2")
    last, top = take(vm, taken)
    same([layer, above, top], truth)
    assert not last.prepared.disks[0].whole, "the files below were closed in order"


@pytest.mark.parametrize("on", [True, False], ids=["live", "off"])
def test_what_a_dead_run_has_left_is_merged_by_a_recovery(lab, runs, take, same, tmp_path, on):
    vm = lab.vm(["qcow2:16", "raw:8"], iothread="disk")
    full, layer = take(vm)
    with left_alone(runs, runs.run(vm, full)):
        vm.io("vda", "write -P 2 2M 1M")
        vm.io("vdb", "write -P 3 2M 1M")
    (state,) = [one for one in runs.hypervisor.vms() if one.vm.uuid == vm.uuid]
    assert len(state.remarks) == 2
    assert f"'vmkeep recover {vm.name}' merges it" in state.remarks[0]
    if not on:
        vm.destroy()
    done = recover(runs, vm, tmp_path / "recover")
    assert sum("merged the overlay" in line for line in done) == 2
    assert recover(runs, vm, tmp_path / "again") == ()
    plain(vm)
    truth = vm.copy(tmp_path / "truth")
    taken, above = take(vm, full)
    same([layer, above], truth)
    assert not taken.prepared.disks[0].whole


def test_what_a_dead_run_has_left_is_merged_by_the_next_run(lab, runs, take, same, tmp_path):
    vm = lab.vm(["qcow2:16"], iothread="disk")
    full, layer = take(vm)
    for number in range(2):
        with left_alone(runs, runs.run(vm, full)):
            vm.io("vda", f"write -P {number + 2} {number + 2}M 1M")
    assert len(overlays(vm)) == 1
    truth = vm.copy_truth(tmp_path / "truth")
    taken, above = take(vm, full)
    same([layer, above], truth)
    assert not taken.prepared.disks[0].whole
    plain(vm)


def test_a_disk_that_got_another_name_before_its_overlay_was_merged(lab, runs, take, same, tmp_path):
    vm = lab.vm(["qcow2:16"], iothread="disk")
    with left_alone(runs, runs.run(vm)):
        vm.io("vda", "write -P 2 2M 1M")
    vm.destroy()
    vm.change(("<target dev='vda' bus='virtio'/>", "<target dev='vdb' bus='virtio'/>"))
    truth = vm.copy(tmp_path / "truth")["vdb"]
    assert len(runs.hypervisor.find(vm.name).remarks) == 1
    recover(runs, vm, tmp_path / "recover")
    assert overlays(vm) == []
    assert vm.disk("vdb").name == "vda.qcow2"
    same([{"vdb": vm.disk("vdb")}], {"vdb": truth})


def test_a_vm_that_cannot_leave_its_overlay_has_no_second_one_at_rest(lab, runs, same, tmp_path):
    """Where AppArmor (libvirt before 12.1) confines a VM that was started on it. Here a lock keeps the merge off."""
    vm = lab.vm(["qcow2:16"], iothread="disk")
    with left_alone(runs, runs.run(vm)):
        vm.io("vda", "write -P 1 1M 1M")
    parent, layers = None, []
    with keep_closed([vm.folder / "vda.qcow2"]):
        for number in range(3):
            vm.io("vda", f"write -P {number + 2} {number + 2}M 1M")
            truth = vm.copy_truth(tmp_path / f"truth{number}")
            with pytest.raises(HypervisorError, match="lock"), runs.take(runs.run(vm, parent)) as taken:
                layers.append(runs.keep(taken, tmp_path / f"layer{number}"))
                assert len(overlays(vm)) == 2
            same(layers, truth)
            assert [disk.whole for disk in taken.prepared.disks] == [number == 0]
            assert len(overlays(vm)) == 1
            parent = taken
    done = recover(runs, vm, tmp_path / "recover")
    assert any("merged the overlay" in line for line in done)
    plain(vm)
    with pytest.raises(IncrementImpossible, match="at the last backup it was"), runs.take(runs.run(vm, parent)):
        pass
    truth = vm.copy_truth(tmp_path / "truth")
    with runs.take(runs.run(vm)) as taken:
        same([runs.keep(taken, tmp_path / "layer")], truth)


def test_a_run_that_ends_before_the_instant_leaves_nothing(lab, runs, monkeypatch):
    vm = lab.vm(["qcow2:16", "raw:8"], iothread="disk")
    run = runs.run(vm)

    def fails(*_: object, **__: object) -> None:
        raise HypervisorError("no snapshot")

    monkeypatch.setattr("backupcore_libvirt.connection.Domain.snapshot", fails)
    with pytest.raises(HypervisorError, match="no snapshot"), runs.take(run):
        pass
    plain(vm)
    vm.untouched()


def test_overlays_that_nothing_uses_yet_are_removed(lab, runs, tmp_path):
    """A run was killed between making them and the instant; a file that holds something is another matter."""
    vm = lab.vm(["qcow2:16"], iothread="disk")
    path = overlay_path(str(vm.disk("vda")), "0" * 32, "vda", temporary=True)
    make_overlay(Path(path), 16 * MiB, str(vm.disk("vda")), "qcow2")
    assert runs.hypervisor.find(vm.name).remarks == ()
    recover(runs, vm, tmp_path / "recover")
    plain(vm)


def test_a_vm_that_was_defined_anew_meanwhile_and_started_on_its_old_disk(lab, runs, take, tmp_path):
    """What it wrote during the backup lies in an overlay that nothing uses: told by every way, and never removed."""
    vm = lab.vm(["qcow2:16"], iothread="disk")
    full, _ = take(vm)
    old = vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    run = runs.run(vm, full)
    with pytest.raises(HypervisorError, match="the VM does not use it") as told, runs.take(run) as taken:
        vm.io("vda", "write -P 2 2M 1M")
        vm.destroy()
        vm.connection.defineXML(old)
        vm.start()
        runs.keep(taken, tmp_path / "layer")
    (path,) = overlays(vm)
    assert str(path) in told.value.message
    assert f"qemu-img convert -f qcow2 -O qcow2 {path} COPY" in told.value.hint
    assert runs.hypervisor.find(vm.name).remarks == (
        f"{path} holds what the VM has written, and the VM does not use it",
    )
    recover(runs, vm, tmp_path / "recover")
    assert overlays(vm) == [path]
    path.unlink()


def test_a_running_vm_that_was_defined_anew_meanwhile(lab, runs, take, same, tmp_path):
    vm = lab.vm(["qcow2:16"], iothread="disk")
    old = vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)

    def during() -> None:
        vm.io("vda", "write -P 2 2M 1M")
        vm.connection.defineXML(old)

    full, layer = take(vm, during=during)
    plain(vm)
    truth = vm.copy_truth(tmp_path / "truth")
    _, above = take(vm, full)
    same([layer, above], truth)


def test_nobody_merges_an_overlay_under_the_reader(lab, runs, take, same, tmp_path):
    """Neither by hand nor with another configuration: of raw files qemu-nbd itself keeps nobody away."""
    vm = lab.vm(["raw:8"], iothread="disk")
    vm.io("vda", "write -P 1 0 1M")
    truth = vm.copy_truth(tmp_path / "truth")
    refused = []

    def during() -> None:
        vm.io("vda", "write -P 2 0 1M")
        flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE
        with pytest.raises(libvirt.libvirtError, match="lock"):
            vm.domain.blockCommit("vda", str(vm.folder / "vda.raw"), None, 0, flags)
        (tmp_path / "other").mkdir()
        with Context(tmp_path / "other") as ctx, pytest.raises(Busy, match="still read by a backup") as error:
            runs.hypervisor.recover(vm.identity, (), ctx)
        refused.append(error.value)

    _, layer = take(vm, during=during)
    same([layer], truth)
    assert len(refused) == 1
    plain(vm)


def test_a_disk_that_grows_or_shrinks_meanwhile(lab, runs, take, same, tmp_path):
    vm = lab.vm(["qcow2:16", "raw:8"], iothread="disk")
    truth = vm.copy_truth(tmp_path / "1")

    def grow() -> None:
        for disk, size in (("vda", 20 * MiB), ("vdb", 12 * MiB)):
            vm.domain.blockResize(disk, size, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
            vm.io(disk, f"write -P 5 {size - MiB} 64k")

    full, layer = take(vm, during=grow)
    same([layer], truth)
    plain(vm)
    truth = vm.copy_truth(tmp_path / "2")
    taken, above = take(vm, full)
    same([layer, above], truth)
    assert [disk.virtual_size for disk in taken.prepared.disks] == [20 * MiB, 12 * MiB]


def test_a_disk_that_is_resized_just_before_the_instant(lab, runs):
    """QEMU would take the overlay as it is, and the guest's disk would be cut off."""
    vm = lab.vm(["qcow2:16"], iothread="disk")
    run = runs.run(vm)
    ready = TemporaryOverlays.ready

    def resized(mechanism: TemporaryOverlays, guard: Guard) -> None:
        ready(mechanism, guard)
        vm.domain.blockResize("vda", 20 * MiB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)

    TemporaryOverlays.ready = resized
    try:
        with pytest.raises(Busy, match="was resized just now"), runs.take(run):
            pass
    finally:
        TemporaryOverlays.ready = ready
    assert vm.domain.blockInfo("vda")[0] == 20 * MiB
    plain(vm)


# The guest at rest


@pytest.fixture
def every_vm(monkeypatch) -> None:
    """VMs that other tests share count as ones with an I/O thread, too."""
    monkeypatch.setattr(choice, "with_iothreads", lambda _, disks: dict.fromkeys(disks, "this test"))


def test_a_guest_that_is_suspended_for_the_instant(lab, take, same, tmp_path):
    vm = lab.vm(["qcow2:16"], iothread="disk")
    vm.io("vda", "write -P 1 1M 1M")
    truth = vm.copy_truth(tmp_path / "truth")
    taken, layer = take(vm, settings={"FS_FREEZE": "SUSPEND"})
    assert taken.prepared.consistency == "paused"
    assert 0 < taken.prepared.frozen_seconds < 10
    same([layer], truth)
    plain(vm)


def test_a_guest_whose_file_systems_are_frozen_for_the_instant(agent_guest, runs, every_vm):
    with runs.take(runs.run(agent_guest, settings={"FS_FREEZE": "AGENT"})) as taken:
        assert taken.prepared.consistency == "filesystem"
        assert agent_guest.status() == "thawed"
        assert len(overlays(agent_guest)) == 1
    assert overlays(agent_guest) == []


def test_a_vm_that_was_paused_stays_so(lab, take, same, tmp_path):
    vm = lab.vm(["qcow2:16"], iothread="disk")
    vm.io("vda", "write -P 1 1M 1M")
    vm.domain.suspend()
    truth = vm.copy_disks(tmp_path / "truth")
    _, layer = take(vm, during=lambda: vm.io("vda", "write -P 2 2M 1M"))
    same([layer], truth)
    assert vm.domain.state() == [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER]
    vm.domain.resume()
    plain(vm)


# libvirtd


def again(vm, daemon) -> None:
    """Connect anew to a libvirtd that was killed."""
    name = vm.name
    daemon.kill()
    daemon.start()
    vm.connection = libvirt.open(daemon.uri)
    vm.domain = vm.connection.lookupByName(name)


def test_libvirtd_is_killed_while_the_disks_are_read(daemon, private, every_vm, same, tmp_path):
    vm, runs = private
    vm.io("vda", "write -P 1 0 1M")
    truth = vm.copy_truth(tmp_path / "truth")
    with runs.take(runs.run(vm)) as full:
        again(vm, daemon)
        vm.io("vda", "write -P 2 1M 1M")
        layer = runs.keep(full, tmp_path / "layer")
    same([layer], truth)
    plain(vm)
    truth = vm.copy_truth(tmp_path / "2")
    with runs.take(runs.run(vm, full)) as taken:
        same([layer, runs.keep(taken, tmp_path / "layer2")], truth)
    assert not any(disk.whole for disk in taken.prepared.disks)


def test_libvirtd_is_killed_before_a_merge_has_ended(daemon, private, every_vm, same, tmp_path, monkeypatch):
    vm, runs = private
    with runs.take(runs.run(vm)) as full:
        layer = runs.keep(full, tmp_path / "layer")
    pivot = Domain.pivot
    killed = []

    def away(domain: Domain, disk: str) -> None:
        if not killed:
            killed.append(disk)
            again(vm, daemon)
        pivot(domain, disk)

    monkeypatch.setattr(Domain, "pivot", away)
    with runs.take(runs.run(vm, full)) as taken:
        vm.io("vda", "write -P 2 1M 1M")
        above = runs.keep(taken, tmp_path / "above")
    assert killed == ["vda"]
    plain(vm)
    truth = vm.copy_truth(tmp_path / "2")
    with runs.take(runs.run(vm, taken)) as last:
        same([layer, above, runs.keep(last, tmp_path / "last")], truth)
    assert not any(disk.whole for disk in last.prepared.disks)


@pytest.mark.soak
def test_libvirtd_is_killed_within_the_call_that_puts_the_overlays_on(daemon, private, every_vm, tmp_path, monkeypatch):
    """The guest goes on, and what lies where is known afterwards, or told: no write is lost, none is passed over."""
    vm, runs = private
    snapshot = Domain.snapshot
    for number, delay in enumerate([0, 0.01, 0.02, 0.03, 0.05, 0.08] * 3):

        def away(domain: Domain, xml: str, *, reuse: bool, delay: float = delay) -> None:
            def begin() -> None:
                with contextlib.suppress(BackupError):
                    snapshot(domain, xml, reuse=reuse)

            call = threading.Thread(target=begin)
            call.start()
            time.sleep(delay)
            again(vm, daemon)
            call.join()

        monkeypatch.setattr(Domain, "snapshot", away)
        before = vm.domain.ID()
        with contextlib.suppress(BackupError), runs.take(runs.run(vm)):
            pass
        assert vm.domain.ID() == before
        vm.io("vda", f"write -P {number + 1} {number}k 1k")
        told = []
        try:
            recover(runs, vm, tmp_path / f"recover{number}")
        except HypervisorError as error:
            told.append(error.message)
        if told:
            assert "it is not clear what disk" in told[0]
            return
        plain(vm)


# Room


@pytest.fixture
def narrow(lab, tmpfs):
    """A VM whose disks lie on a file system of 64 MiB, of which 6 are the reserve."""

    def make(driver: str = ""):
        folder, owner = tmpfs(64), lab.folder.stat()
        os.chown(folder, owner.st_uid, owner.st_gid)
        made.append(lab.vm(["qcow2:200"], iothread="disk", driver=driver, folder=folder))
        return made[-1]

    made: list = []
    yield make
    for vm in made:
        lab.made.remove(vm)
        vm.remove()  # before its file system


def test_a_guest_that_fills_the_file_system_ends_the_backup_and_goes_on(narrow, runs, wait_for):
    vm = narrow()
    run = runs.run(vm)
    before = life(vm)
    with pytest.raises(TargetFull, match="given up so that the guest can go on"), runs.take(run) as taken:
        written = 0
        while not taken.ctx.cancelled and written < 60:
            written += 1
            vm.io("vda", f"write -P 7 {written}M 1M")
            time.sleep(0.05)  # the reserve of so small a file system is what the watch sees in time at 30 MB/s
        wait_for(lambda: taken.ctx.cancelled, "the watch")
        taken.ctx.check()
    assert 20 < written < 40, "what is in the overlay has to fit once more into the file below"
    assert life(vm) == before
    plain(vm)
    vm.io("vda", f"read -P 7 1M {written}M")


def test_too_little_room_is_told_before_the_guest_is_touched(narrow, runs):
    vm = narrow()
    filler = vm.folder / "filler"
    free = os.statvfs(vm.folder)
    filler.write_bytes(bytes(free.f_bavail * free.f_frsize - 8 * MiB))
    with pytest.raises(TargetFull, match="MiB are free in"), runs.take(runs.run(vm)):
        pass
    filler.unlink()
    vm.untouched()
    plain(vm)


def test_a_disk_that_is_a_link_needs_room_where_its_file_lies(tmpfs, tmp_path):
    """The overlay lies beside the link; the merge grows the file."""
    home = tmpfs(64)
    (home / "disk.raw").touch()
    os.truncate(home / "disk.raw", 200 * MiB)
    below, overlay = tmp_path / "disk.raw", tmp_path / "overlay"
    below.symlink_to(home / "disk.raw")
    overlay.write_bytes(b"x" * 20 * MiB)
    growing = [Growing.of("vda", str(overlay), str(below), 200 * MiB)]
    require_room("web1", growing, {})
    assert too_full(growing) == ""
    (home / "others").write_bytes(b"x" * 45 * MiB)
    assert f"19 MiB are free in {home}" in too_full(growing)
    with pytest.raises(TargetFull, match="error_policy"):
        require_room("web1", growing, {"vda": 200 * MiB})
    (home / "others").write_bytes(b"x" * 55 * MiB)
    with pytest.raises(TargetFull, match=f"MiB are free in {home}"):
        require_room("web1", growing, {})


def test_a_full_file_system_stops_the_guest_only_until_its_overlay_is_merged(narrow, runs, wait_for):
    """Somebody else fills it in one go, faster than the watch can see, and then makes room again."""
    vm = narrow()
    vm.io("vda", "write -P 7 1M 8M")
    filler = vm.folder / "filler"
    with pytest.raises(TargetFull), runs.take(runs.run(vm)) as taken:
        free = os.statvfs(vm.folder)
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)
        wait_for(lambda: taken.ctx.cancelled, "the watch")
        filler.unlink()
        taken.ctx.check()
    plain(vm)


def test_a_policy_that_loses_writes_needs_room_for_all_of_them(narrow, runs):
    vm = narrow("error_policy='report'")
    with pytest.raises(TargetFull, match="error_policy makes the guest lose"), runs.take(runs.run(vm)):
        pass
    vm.untouched()


# What cannot be held


@pytest.fixture
def refuse(runs):
    """Asserts that a run is refused before anything is touched, and returns the error."""

    def check(vm, match: str) -> BackupError:
        run = runs.run(vm)
        with pytest.raises(UnsupportedOperation, match=match):
            runs.hypervisor.estimate(run)
        with pytest.raises(UnsupportedOperation, match=match) as refused, runs.take(run):
            pass
        assert "has an I/O thread" in refused.value.message
        assert "QEMU 8.2.3, 9.0" in refused.value.hint
        assert overlays(vm) == []
        vm.untouched()
        return refused.value

    return check


def test_a_transient_vm_is_refused(lab, refuse):
    vm = lab.vm(["qcow2:8"], iothread="disk")
    vm.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
    refuse(vm, "the VM is transient")


def test_a_block_device_is_refused(lab, loop, refuse):
    disk = (
        f"<disk type='block' device='disk'><driver name='qemu' type='raw' iothread='1'/><source dev='{loop}'/>"
        "<target dev='vdb' bus='virtio'/></disk>"
    )
    refuse(lab.vm(["qcow2:8"], iothread="disk", more=disk), f"disk vdb \\({loop}\\) is no plain file")


def test_a_disk_that_is_a_part_of_its_file_is_refused(lab, refuse):
    """qemu-nbd would show all of the file."""
    vm = lab.vm(["raw:8"], iothread="disk", start=False)
    source = f"<source file='{vm.folder}/vda.raw'/>"
    piece = "<slices><slice type='storage' offset='1048576' size='4194304'/></slices>"
    vm.change((source, f"<source file='{vm.folder}/vda.raw'>{piece}</source>"))
    vm.start()
    refuse(vm, "its <source> has <slices>")
