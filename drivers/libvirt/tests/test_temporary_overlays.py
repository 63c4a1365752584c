"""VMs that are held by an overlay on each disk for the time of a run: with an I/O thread, in a QEMU that a backup job
would kill. The bytes are compared with what QEMU's own tools copied.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import libvirt
import pytest

from backupcore.disk.nbd import ConnectionLost
from backupcore.errors import BackupError, Busy, HypervisorError, TargetFull, UnsupportedOperation
from backupcore.model import RunState
from backupcore_libvirt.apparmor import denies_merges
from backupcore_libvirt.connection import Connection, Domain
from backupcore_libvirt.mechanisms.temporary_overlays import TemporaryOverlays
from backupcore_libvirt.overlay.merge import Merger
from backupcore_libvirt.overlay.room import Growing, require_room, too_full
from backupcore_libvirt.release.guard import Guard

pytestmark = pytest.mark.usefixtures("every_qemu_dies")

MiB = 1 << 20


def test_full_and_increments(lab, take, same, tmp_path):
    vm = lab.vm(["qcow2:64", "raw:9"], iothread="disk")
    vm.io("vda", "write -P 0x11 0 8M", "write -P 0x12 30M 1M")
    vm.io("vdb", "write -P 0x13 1M 1M")
    before, layers, parent = vm.life(), [], None
    changes = [
        [],
        ["write -P 0x21 1M 64k", "write -z 2M 1M", "write -z -u 4M 1M", "discard 6M 1M", "write -P 0x22 40000k 512"],
        ["write -P 0x31 2500k 128k", "write -P 0x32 30M 4k"],
    ]

    def during() -> None:
        # What the guest writes from here on is no part of the backup, and part of the next one.
        assert [path.suffixes[-2:] for path in vm.overlays()] == [[".temporary", ".qcow2"]] * 2
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
        vm.plain()
    assert vm.life() == before
    held = parent.prepared.artifacts[0].layout
    assert sum(extent.length for extent in held.extents()) <= 7 * 65536, "what changed, and no more"


def test_nobody_is_connected_to_qemu(lab, runs):
    """That is what would kill it: the run's sockets are those of qemu-nbd, and no job is there."""
    vm = lab.vm(["qcow2:8"], iothread="disk")
    run = runs.run(vm)
    with runs.take(run):
        assert {path.name for path in (runs.hypervisor.scratch / run.id).iterdir()} == {"nbd.vda.sock"}
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
    vm.plain()


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
    vm.plain()


def test_a_comparison_with_the_last_backup(lab, take, runs, tmp_path):
    """What `vmkeep vm compare` asks: no NBD client on the VM's QEMU either, and no checkpoint."""
    vm = lab.vm(["qcow2:16", "raw:8"], iothread="disk")
    vm.io("vda", "write -P 1 0 4M")
    parent, _ = take(vm)
    vm.io("vda", "write -P 2 1M 64k")
    checkpoints, before = vm.checkpoints(), vm.life()
    run = runs.run(vm, parent)
    with runs.context(run) as ctx, runs.hypervisor.unchanged(run, ["vda", "vdb"], ctx) as (first, second):
        assert len(vm.overlays()) == 1
        extents = [(e.offset, e.length) for e in first.extents if e.kind.name == "DATA"]
        assert extents == [(0, MiB), (MiB + 65536, 3 * MiB - 65536)]
        assert second.why_not.startswith("raw")
    assert (vm.checkpoints(), vm.life()) == (checkpoints, before)
    vm.plain()


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
    before = vm.life()
    parent, layer = take(vm)
    vm.io("vda", "write -P 1 1M 1M")
    run = runs.run(vm, parent)
    named = pytest.raises(ConnectionLost, match=f"disk vda of VM {vm.name}: ")  # and not its socket, which nobody knows
    with named, runs.take(run) as taken:
        for process in readers(runs.hypervisor.scratch / run.id):
            os.kill(process, signal.SIGKILL)
        vm.io("vda", "write -P 2 2M 1M")
        runs.keep(taken, tmp_path / "torn")
    assert vm.life() == before
    vm.plain()
    truth = vm.copy_truth(tmp_path / "truth")
    taken, above = take(vm, parent)
    same([layer, above], truth)
    assert not taken.prepared.disks[0].whole


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
        assert len(vm.overlays()) == 2
        vm.destroy()
        runs.recover(vm)
    vm.plain()
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

    def follow_to_the_end(self, stack) -> None:
        if vm.active:
            assert vm.domain.blockJobInfo(stack.disk, 0)["cur"] < 30 * MiB
            getattr(vm, end)()
        follow(self, stack)

    monkeypatch.setattr(Domain, "begin_commit", slow)
    monkeypatch.setattr(Merger, "_follow", follow_to_the_end)
    with runs.take(runs.run(vm)):
        vm.io("vda", "write -P 2 10M 30M", "flush")
        truth = vm.copy_truth(tmp_path / "truth")
    assert not vm.active
    vm.plain()
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
    vm.plain()
    vm.start()
    truth = vm.copy_truth(tmp_path / "2")
    last, top = take(vm, taken)
    same([layer, above, top], truth)
    assert not last.prepared.disks[0].whole, "the files below were closed in order"


def test_a_disk_that_grows_or_shrinks_meanwhile(lab, runs, take, same, tmp_path):
    vm = lab.vm(["qcow2:16", "raw:8"], iothread="disk")
    truth = vm.copy_truth(tmp_path / "1")

    def grow() -> None:
        for disk, size in (("vda", 20 * MiB), ("vdb", 12 * MiB)):
            vm.domain.blockResize(disk, size, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
            vm.io(disk, f"write -P 5 {size - MiB} 64k")

    full, layer = take(vm, during=grow)
    same([layer], truth)
    vm.plain()
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
    vm.plain()


# The guest at rest


def test_a_guest_that_is_suspended_for_the_instant(lab, take, same, tmp_path):
    vm = lab.vm(["qcow2:16"], iothread="disk")
    vm.io("vda", "write -P 1 1M 1M")
    truth = vm.copy_truth(tmp_path / "truth")
    taken, layer = take(vm, settings={"FS_FREEZE": "SUSPEND"})
    assert taken.prepared.consistency == "paused"
    assert 0 < taken.prepared.frozen_seconds < 10
    same([layer], truth)
    vm.plain()


def test_a_guest_whose_file_systems_are_frozen_for_the_instant(agent_guest, runs, every_vm):
    with runs.take(runs.run(agent_guest, settings={"FS_FREEZE": "AGENT"})) as taken:
        assert taken.prepared.consistency == "filesystem"
        assert agent_guest.status() == "thawed"
        assert len(agent_guest.overlays()) == 1
    assert agent_guest.overlays() == []


def test_a_vm_that_was_paused_stays_so(lab, take, same, tmp_path):
    vm = lab.vm(["qcow2:16"], iothread="disk")
    vm.io("vda", "write -P 1 1M 1M")
    vm.domain.suspend()
    truth = vm.copy_disks(tmp_path / "truth")
    _, layer = take(vm, during=lambda: vm.io("vda", "write -P 2 2M 1M"))
    same([layer], truth)
    assert vm.domain.state() == [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER]
    vm.domain.resume()
    vm.plain()


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
    before = vm.life()
    with pytest.raises(TargetFull, match="given up so that the guest can go on"), runs.take(run) as taken:
        written = 0
        while not taken.ctx.cancelled and written < 60:
            written += 1
            vm.io("vda", f"write -P 7 {written}M 1M")
            time.sleep(0.05)  # the reserve of so small a file system is what the watch sees in time at 30 MB/s
        wait_for(lambda: taken.ctx.cancelled, "the watch")
        taken.ctx.check()
    assert 20 < written < 40, "what is in the overlay has to fit once more into the file below"
    assert vm.life() == before
    vm.plain()
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
    vm.plain()


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
    vm.plain()


@pytest.mark.parametrize("on", [True, False], ids=["live", "off"])
def test_a_merge_without_room_says_where_the_vm_goes_on_and_what_to_do(narrow, runs, on):
    vm = narrow()
    filler = vm.folder / "filler"
    with runs.left_alone(runs.run(vm)):
        vm.io("vda", "write -P 7 1M 8M")
    (overlay,) = vm.overlays()
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while file.write(bytes(4096)):
            pass
    if not on:
        vm.destroy()
    with pytest.raises(TargetFull, match=rf"is not merged: 0 MiB are free in {vm.folder}, and up to \d+ MiB") as told:
        runs.recover(vm)
    assert f"goes on in {overlay}" in told.value.hint
    assert f"vmkeep recover {vm.name}" in told.value.hint
    filler.unlink()
    runs.recover(vm)
    vm.plain()
    vm.write("vda", "read -P 7 1M 8M")


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
        assert vm.overlays() == []
        vm.untouched()
        return refused.value

    return check


def test_a_transient_vm_is_refused(lab, refuse):
    vm = lab.vm(["qcow2:8"], iothread="disk")
    vm.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
    refuse(vm, "the VM is transient")


def test_a_disk_that_is_a_part_of_its_file_is_refused(lab, refuse):
    """qemu-nbd would show all of the file."""
    vm = lab.vm(["raw:8"], iothread="disk", start=False)
    source = f"<source file='{vm.folder}/vda.raw'/>"
    piece = "<slices><slice type='storage' offset='1048576' size='4194304'/></slices>"
    vm.change((source, f"<source file='{vm.folder}/vda.raw'>{piece}</source>"))
    vm.start()
    refuse(vm, "its <source> has <slices>")
