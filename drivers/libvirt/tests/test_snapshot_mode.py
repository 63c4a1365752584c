"""INCREMENT_MODE=SNAPSHOT, compared byte for byte with what QEMU's own tools copied."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from xml.etree import ElementTree

import libvirt
import pytest

from backupcore import guard as asking
from backupcore.context import Context
from backupcore.disk.extents import Kind
from backupcore.errors import Cancelled, HypervisorError, IncrementImpossible, TargetFull, UnsupportedOperation
from backupcore.model import Outcome, RunState
from backupcore_libvirt import image_tail
from backupcore_libvirt.apparmor import denies_merges
from backupcore_libvirt.connection import Connection

MiB = 1 << 20
SNAPSHOT = {"MODE": "INCREMENT", "INCREMENT_MODE": "SNAPSHOT"}


def files(vm, disk: str, *, inactive: bool = False) -> list[str]:
    """The files of a disk, the one that the VM writes to first: by libvirt where it runs, by their headers."""
    root = ElementTree.fromstring(vm.domain.XMLDesc(2 if inactive else 0))
    element = next(d for d in root.iterfind("devices/disk") if d.find("target").get("dev") == disk)
    top, shape = element.find("source").get("file"), element.find("driver").get("type")
    info = subprocess.run(
        ["qemu-img", "info", "-U", "--backing-chain", "-f", shape, "--output=json", top],
        capture_output=True,
        text=True,
        check=True,
    )
    chain = [image["filename"] for image in json.loads(info.stdout)]
    if vm.active and not inactive:
        below = [s.get("file") for s in element.iterfind(".//backingStore/source")]
        assert [top, *below] == chain
    return chain


def qemu_io(path: str, *commands: str) -> None:
    options = [part for command in commands for part in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *options, path], check=True, capture_output=True)


def qemu_img(*arguments: str) -> None:
    subprocess.run(["qemu-img", *arguments], check=True, capture_output=True)


def beside(vm) -> list[str]:
    """The overlays that lie in the VM's folder."""
    return sorted(path.name for path in vm.folder.iterdir() if "backupcore" in path.name)


def name(vm, disk: str, run, shape: str = "qcow2") -> str:
    return f"{vm.folder}/{disk}.{shape}.backupcore-{run.point}-{disk}.qcow2"


class Chain:
    """A chain of backups of one VM by overlays, each compared with the truth of its instant."""

    def __init__(self, vm, runs, same, tmp_path):
        self.vm, self.runs, self.same, self.folder = vm, runs, same, tmp_path
        self.layers, self.truths, self.taken = [], [], []

    @property
    def parent(self):
        return self.taken[-1] if self.taken else None

    def truth(self) -> dict[str, Path]:
        folder = self.folder / f"truth{len(self.truths)}"
        return self.vm.copy_truth(folder) if self.vm.active else self.vm.copy_disks(folder)

    def backup(self, *, truth=None, during=lambda: None, **more):
        """One backup; its layers restored must be what the disks held (`truth`, where they were copied before)."""
        self.truths.append(truth or self.truth())
        spent = tuple(taken.run.point for taken in self.taken[:-1])
        run = self.runs.run(self.vm, self.parent, settings=SNAPSHOT, spent=spent, **more)
        with self.runs.take(run) as taken:
            during()
            self.layers.append(self.runs.keep(taken, self.folder / f"layer{len(self.layers)}"))
        self.taken.append(taken)
        self.same(self.layers, self.truths[-1])
        return taken


@pytest.fixture
def chain(runs, same, tmp_path):
    return lambda vm: Chain(vm, runs, same, tmp_path)


def test_full_and_increments_of_raw_and_old_qcow2_disks(lab, chain):
    vm = lab.vm(["raw:64", "qcow2v2:33"])
    vm.io("vda", "write -P 0x11 0 8M", "write -P 0x12 30M 1M")
    vm.io("vdb", "write -P 0x13 32M 1M")
    held = chain(vm)
    changes = [
        [],
        [
            ("vda", "write -P 0x21 1M 64k"),
            ("vda", "write -z 2M 1M"),
            ("vda", "write -z -u 4M 1M"),
            ("vda", "discard 6M 1M"),
            ("vda", "write -P 0x22 40000k 512"),
            ("vdb", "write -P 0x23 33500k 292k"),
        ],
        [("vda", "write -P 0x31 2500k 128k"), ("vda", "write -P 0x32 30M 4k"), ("vdb", "discard 32M 512k")],
    ]

    def during() -> None:
        # What the guest writes from here on is no part of the backup, and part of the next one.
        vm.io("vda", "write -P 0x77 0 1M")
        vm.io("vdb", "write -P 0x78 0 1M")
        assert len(files(vm, "vda")) == (3 if len(held.taken) else 2)

    for number, change in enumerate(changes):
        for disk, command in change:
            vm.io(disk, command)
        taken = held.backup(during=during)
        assert taken.prepared.consistency == "crash"
        assert [(d.id, d.virtual_size, d.whole) for d in taken.prepared.disks] == [
            ("vda", 64 * MiB, not number),
            ("vdb", 33 * MiB, not number),
        ]
        for inactive in (False, True):
            assert files(vm, "vda", inactive=inactive) == [name(vm, "vda", taken.run, "raw"), f"{vm.folder}/vda.raw"]
            assert files(vm, "vdb", inactive=inactive) == [name(vm, "vdb", taken.run), f"{vm.folder}/vdb.qcow2"]
        assert len(beside(vm)) == 2
    for number, truth in enumerate(held.truths):
        held.same(held.layers[: number + 1], truth)
    layout = held.parent.prepared.artifacts[0].layout
    assert sum(e.length for e in layout.extents() if e.kind is Kind.DATA) <= MiB + 5 * 65536, "changes only"


def test_overlays_at_rest_do_not_pile_up(lab, runs, same, tmp_path):
    """One for each disk, night after night; none where AppArmor would keep a running VM from merging them."""
    vm = lab.vm(["raw:16", "qcow2:16"])
    with Connection(runs.hypervisor.uri) as connection:
        closed = denies_merges(connection, connection.domain(vm.uuid))
    parent, layers = None, []
    for night in range(5):
        for disk in ("vda", "vdb"):
            vm.io(disk, f"write -P {night + 1} {night}M 64k")
        truth = vm.copy_truth(tmp_path / f"truth{night}")
        run = runs.run(vm, parent, settings=SNAPSHOT)
        if closed and parent is not None:
            with pytest.raises(IncrementImpossible, match="AppArmor confines the VM"), runs.take(run):
                pass
            run, layers = runs.run(vm, settings=SNAPSHOT), []
        with runs.take(run) as parent:
            layers.append(runs.keep(parent, tmp_path / f"night{night}"))
        same(layers, truth)
        assert len(beside(vm)) == (0 if closed else 2)


def test_all_disks_show_one_instant_of_a_guest_that_writes(counting_vm, runs, restored, tmp_path, wait_for):
    """Overlays come and are merged, and failed runs take theirs back, below a guest that never stops writing."""
    vm = counting_vm("raw")
    parent, layers, seen = None, [], 0
    for number in range(2):
        before = vm.domain.blockStats("vdb")[2]
        wait_for(lambda before=before: vm.domain.blockStats("vdb")[2] > before + 10, "the guest writes", 60)
        with runs.take(runs.run(vm, parent, settings=SNAPSHOT), state=RunState.FAILED):
            pass
        with runs.take(runs.run(vm, parent, settings=SNAPSHOT)) as parent:
            layers.append(runs.keep(parent, tmp_path / f"layer{number}"))
        disks = [restored([layer[disk] for layer in layers], tmp_path / disk) for disk in ("vda", "vdb")]
        first, second = (int.from_bytes(disk.read_bytes()[MiB : MiB + 4], "little") for disk in disks)
        assert first - second in (0, 1), "the second disk is at most one write behind the first"
        assert second > seen
        seen = second
    runs.hypervisor.forget(vm.identity)
    assert beside(vm) == []
    with vm.suspended():
        now = [int.from_bytes(Path(files(vm, d)[0]).read_bytes()[MiB : MiB + 4], "little") for d in ("vda", "vdb")]
    assert now[0] >= now[1] > seen, "nothing that the guest has written was lost on the way"


def test_live_and_off_in_one_chain(lab, chain):
    vm = lab.vm(["raw:32", "qcow2:16"])
    held = chain(vm)

    def change(number: int) -> None:
        if vm.active:
            vm.io("vda", f"write -P {number} {number}M 700k", f"write -z {number + 1}M 64k")
            vm.io("vdb", f"write -P {number + 100} {number}M 4k")
        else:
            for disk in ("vda", "vdb"):
                qemu_io(files(vm, disk)[0], f"write -P {number} {number}M 300k")

    for number, on in enumerate((True, False, False, True, True, False), 1):
        if on != vm.active:
            vm.start() if on else vm.destroy()
        if number > 1:
            change(number)
        taken = held.backup()
        assert taken.prepared.consistency == ("crash" if on else "off")
        assert files(vm, "vda") == [name(vm, "vda", taken.run, "raw"), f"{vm.folder}/vda.raw"]
        assert len(beside(vm)) == 2
        top, base = Path(files(vm, "vda")[0]), vm.folder / "vda.raw"
        assert not top.stat().st_mode & ~base.stat().st_mode, "no more open than the disk itself"
    vm.start()
    vm.io("vda", "read -P 6 6M 300k")
    assert files(vm, "vda", inactive=True) == files(vm, "vda")


def test_a_disk_whose_name_has_commas(lab, chain):
    """libvirt doubles them where it makes the overlay of a VM that is off, and the VM started no more."""
    vm = lab.vm(["qcow2:8"], start=False)
    vm.write("vda", "write -P 1 0 1M")
    vm.disk("vda").rename(vm.folder / "a,b ,c.qcow2")
    vm.change(("vda.qcow2", "a,b ,c.qcow2"))
    held = chain(vm)
    for number, on in enumerate((False, False, True, False)):
        if on != vm.active:
            vm.start() if on else vm.destroy()
        top = files(vm, "vda")[0]
        vm.io("vda", f"write -P {number} {number}M 64k") if on else qemu_io(top, f"write -P {number} {number}M 64k")
        taken = held.backup()
        assert files(vm, "vda") == [
            f"{vm.folder}/a,b ,c.qcow2.backupcore-{taken.run.point}-vda.qcow2",
            f"{vm.folder}/a,b ,c.qcow2",
        ]
    vm.start()


def test_a_vm_may_start_and_end_while_it_is_read(lab, runs, chain):
    vm = lab.vm(["raw:16"], start=False)
    held = chain(vm)
    held.backup()
    qemu_io(files(vm, "vda")[0], "write -P 1 1M 1M")
    name = vm.identity.name

    def start() -> None:
        assert not runs.hypervisor.find(name).being_read, "it can start"
        vm.start()
        assert runs.hypervisor.find(name).being_read

    held.backup(during=start)
    assert len(files(vm, "vda")) == 2
    vm.io("vda", "write -P 2 2M 1M")
    held.backup(during=vm.destroy)
    assert len(files(vm, "vda")) == 2
    # A full without overlays, of another datastore, reads the file that the VM would write to.
    with runs.take(runs.run(vm, settings=SNAPSHOT, keep=(held.parent.run.point,))):
        assert runs.hypervisor.find(name).being_read


def test_a_vm_is_stopped_for_the_one_call(lab, runs, chain):
    vm = lab.vm(["raw:16"])
    held = chain(vm)
    truth = held.truth()
    with runs.take(runs.run(vm, settings={**SNAPSHOT, "FS_FREEZE": "SUSPEND"})) as taken:
        assert vm.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
        layer = runs.keep(taken, held.folder / "layer")
    held.same([layer], truth)
    assert taken.prepared.consistency == "paused"
    assert 0 < taken.prepared.frozen_seconds < 30


@pytest.mark.parametrize("on", [True, False], ids=["live", "off"])
def test_a_failed_run_leaves_the_disks_as_they_were(lab, runs, chain, on):
    vm = lab.vm(["raw:16", "qcow2:16"], start=on)
    plain = {disk: files(vm, disk) for disk in ("vda", "vdb")}
    with runs.take(runs.run(vm, settings=SNAPSHOT), state=RunState.CANCELLED):
        assert len(beside(vm)) == 2
        if on:
            vm.io("vda", "write -P 1 1M 1M")
    assert {disk: files(vm, disk) for disk in plain} == plain, "a failed first backup leaves plain disks"
    assert beside(vm) == []
    held = chain(vm)
    held.backup()
    at_rest = {disk: files(vm, disk) for disk in plain}
    if on:
        vm.io("vda", "write -P 2 2M 1M")
    with runs.take(runs.run(vm, held.parent, settings=SNAPSHOT), state=RunState.FAILED):
        if on:
            vm.io("vda", "write -P 3 3M 1M")
        assert len(beside(vm)) == 4
    assert {disk: files(vm, disk) for disk in plain} == at_rest
    if on:
        vm.io("vda", "read -P 1 1M 1M", "read -P 2 2M 1M", "read -P 3 3M 1M")
    held.backup()
    assert len(beside(vm)) == 2


def killed(held, *, recorded: bool):
    """A run whose process died before `postbackup`, with its guard, which would have merged: all else is as it was.

    Its readers are gone. Returns the run.
    """
    run = held.runs.run(held.vm, held.parent, settings=SNAPSHOT, spent=tuple(t.run.point for t in held.taken[:-1]))
    truth = held.truth()
    with held.runs.left_alone(run) as taken:
        layer = held.runs.keep(taken, held.folder / run.id)
        for artifact in taken.prepared.artifacts:
            artifact.close()
    if recorded:
        held.truths.append(truth)
        held.layers.append(layer)
        held.taken.append(taken)
    return run


def settle(held, run, state: RunState) -> None:
    with Context(held.folder) as ctx:
        held.runs.hypervisor.postbackup(run, Outcome(state=state), ctx)


@pytest.mark.parametrize("on", [pytest.param(True, id="live"), pytest.param(False, id="off", marks=pytest.mark.soak)])
def test_killed_runs_are_settled_by_the_next_one(lab, chain, on):
    vm = lab.vm(["raw:16", "qcow2:16"], start=on)
    held = chain(vm)
    held.backup()
    for number, recorded in enumerate((False, False, False, True, False)):
        # Each overlay has blocks that no other one has.
        if on:
            vm.io("vda", f"write -P {number + 1} {number}M 256k", f"write -z {number + 8}M 64k")
        else:
            qemu_io(files(vm, "vda")[0], f"write -P {number + 1} {number}M 256k", f"write -z {number + 8}M 64k")
        killed(held, recorded=recorded)
        assert len(files(vm, "vda")) <= 5
    # Two runs that nobody recorded, and one that was and did not merge.
    held.backup()
    assert len(beside(vm)) == 2
    if on:
        vm.io("vda", "write -P 9 6M 1M")
    killed(held, recorded=True)
    settle(held, held.parent.run, RunState.RECORDED)
    assert files(vm, "vda") == [name(vm, "vda", held.parent.run, "raw"), f"{vm.folder}/vda.raw"]
    settle(held, held.parent.run, RunState.RECORDED)  # once more is harmless
    held.backup()
    assert list(held.runs.hypervisor.scratch.iterdir()) == []


def test_a_commit_that_was_cut_off_is_done_again(lab, chain, wait_for):
    vm = lab.vm(["raw:64"])
    held = chain(vm)
    held.backup()

    def half_merged() -> tuple[str, dict[str, Path]]:
        vm.io("vda", "write -P 5 8M 24M")
        killed(held, recorded=True)
        # Copied before: QEMU 7.2 crashes where a VM is stopped in the moment in which a commit ends.
        truth = held.truth()
        _, middle, base = files(vm, "vda")
        vm.domain.blockCommit("vda", base, middle, 2, libvirt.VIR_DOMAIN_BLOCK_COMMIT_DELETE)
        wait_for(lambda: vm.domain.blockJobInfo("vda", 0).get("cur", 0) > 8 * MiB, "the commit is under way")
        return middle, truth

    # The process that began it is dead, QEMU goes on: the next run waits for it.
    middle, truth = half_merged()
    vm.domain.blockJobSetSpeed("vda", 0, 0)
    held.backup(truth=truth)
    assert not Path(middle).exists()
    # QEMU itself is killed: nothing has moved, and the VM is off.
    middle, truth = half_merged()
    vm.kill()
    assert len(files(vm, "vda")) == 3
    held.backup(truth=truth)
    assert not Path(middle).exists()
    vm.start()
    vm.io("vda", "read -P 5 8M 24M")
    # A failed run was taking its overlay back when it was killed.
    vm.io("vda", "write -P 6 1M 1M")
    killed(held, recorded=False)
    truth = held.truth()
    vm.domain.blockCommit("vda", files(vm, "vda")[1], None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
    held.backup(truth=truth)
    assert len(files(vm, "vda")) == 2


@pytest.mark.parametrize("under_way", [False, True], ids=["before", "under-way"])
def test_the_guest_outlives_a_merge_where_its_file_system_is_full(lab, chain, tmpfs, under_way):
    folder, owner = tmpfs(80), lab.folder.stat()
    os.chown(folder, owner.st_uid, owner.st_gid)
    vm = lab.vm(["raw:32"], folder=folder)
    vm.io("vda", "write -P 1 0 8M")
    held = chain(vm)
    held.backup()
    vm.io("vda", "write -P 2 0 8M")
    killed(held, recorded=True)
    top, middle, base = files(vm, "vda")
    if under_way:
        vm.domain.blockCommit("vda", base, middle, 2, libvirt.VIR_DOMAIN_BLOCK_COMMIT_DELETE)
    filler = vm.folder / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while file.write(bytes(4096)):
            pass
    with pytest.raises(OSError, match="No space left"):
        vm.io("vda", "write -P 3 8M 4M")  # QEMU now has tables in its memory that find no room
    with pytest.raises(TargetFull, match="the overlay of disk vda is not merged"):
        settle(held, held.parent.run, RunState.RECORDED)
    assert vm.active
    assert files(vm, "vda") == [top, middle, base]
    assert vm.domain.blockJobInfo("vda", 0) == {}
    filler.unlink()
    settle(held, held.parent.run, RunState.RECORDED)
    assert files(vm, "vda") == [top, base]
    held.backup()


def test_a_guest_that_fills_the_file_system_ends_the_backup_and_goes_on(lab, chain, tmpfs, wait_for):
    folder, owner = tmpfs(64), lab.folder.stat()
    os.chown(folder, owner.st_uid, owner.st_gid)
    vm = lab.vm(["raw:200"], folder=folder)
    held = chain(vm)
    held.backup()
    before, life = files(vm, "vda"), vm.life()
    run = held.runs.run(vm, held.parent, settings=SNAPSHOT)
    with pytest.raises(TargetFull, match="given up so that the guest can go on"), held.runs.take(run) as taken:
        written = 0
        while not taken.ctx.cancelled and written < 60:
            written += 1
            vm.io("vda", f"write -P 7 {written}M 1M")
            time.sleep(0.05)  # as in test_temporary_overlays.py
        wait_for(lambda: taken.ctx.cancelled, "the watch")
        taken.ctx.check()
    assert (vm.life(), files(vm, "vda")) == (life, before)
    vm.io("vda", f"read -P 7 1M {written}M")
    vm.io("vda", "write -P 8 1M 1M")
    held.backup()


def test_a_merge_of_a_vm_that_is_off_cut_off_at_each_step(lab, chain):
    vm = lab.vm(["raw:16"], start=False)
    held = chain(vm)
    held.backup()
    for steps in (1, 2):
        qemu_io(files(vm, "vda")[0], f"write -P {steps} {steps}M 1M")
        killed(held, recorded=True)
        top, middle, base = files(vm, "vda")
        qemu_img("commit", "-q", "-f", "qcow2", middle)
        if steps == 2:
            qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", base, top)
            assert Path(middle).exists()
        held.backup()
        assert beside(vm) == [Path(files(vm, "vda")[0]).name]


def defined_as_before(lab, chain):
    """A VM with one backup, off, that is defined as before that: what it has written since is in the overlay only."""
    vm = lab.vm(["raw:16"], start=False)
    held = chain(vm)
    held.backup()
    lost = files(vm, "vda")[0]
    qemu_io(lost, "write -P 1 1M 1M")
    truth = held.truth()
    vm.change((lost, f"{vm.folder}/vda.raw"), ("type='qcow2'", "type='raw'"))
    return vm, held, lost, truth


def test_an_overlay_is_used_again_where_its_disk_was_not_written_to(lab, chain, caplog):
    """The VM was defined anew with its first file, and has not run since."""
    vm, held, lost, truth = defined_as_before(lab, chain)
    taken = held.backup(truth=truth)
    assert f"put right: {lost}" in caplog.text
    assert not taken.prepared.disks[0].whole
    assert beside(vm) == [name(vm, "vda", taken.run, "raw").rpartition("/")[2]]
    assert held.runs.hypervisor.find(vm.name).remarks == ()


def test_an_overlay_that_lies_about_and_holds_something_stays_and_is_told(lab, chain):
    """Its disk was written to since, so the two do not belong together any more."""
    vm, held, lost, _ = defined_as_before(lab, chain)
    subprocess.run(["qemu-io", "-f", "raw", "-c", "write -P 2 3M 1k", vm.folder / "vda.raw"], check=True)
    before = Path(lost).read_bytes()
    with pytest.raises(IncrementImpossible, match="no longer on .*, which holds what was written"):
        held.backup()
    anew = chain(vm)
    for number in range(2):
        with pytest.raises(HypervisorError, match="the VM does not use it") as told:
            anew.backup()
        assert f"qemu-img convert -f qcow2 -O qcow2 {lost} COPY" in told.value.hint
        assert len(held.runs.hypervisor.find(vm.name).remarks) == 1, number
    finding = next(one for one in held.runs.hypervisor.check(try_vm=False) if one.subject == f"disks of VM {vm.name}")
    assert (finding.ok, lost in finding.detail) == (False, True)
    vm.start()
    assert len(held.runs.hypervisor.find(vm.name).remarks) == 1
    vm.destroy()
    held.runs.hypervisor.forget(vm.identity)
    assert Path(lost).read_bytes() == before


def test_a_run_that_hangs_and_was_given_up_leaves_no_overlay(lab, chain, wait_for):
    """Whoever owns it may hang for hours, and nobody looks any more at the room that the overlay takes."""
    vm = lab.vm(["raw:16"])
    held = chain(vm)
    held.backup()
    before = files(vm, "vda")
    with pytest.raises(Cancelled), held.runs.take(held.runs.run(vm, held.parent, settings=SNAPSHOT)) as taken:
        vm.io("vda", "write -P 3 2M 1M")
        assert len(files(vm, "vda")) == 3
        assert asking.give_up(taken.ctx.folder, Cancelled("cancelled"), 60).released
        wait_for(lambda: files(vm, "vda") == before, "the guard merges", 60)
        taken.ctx.check()
    assert files(vm, "vda") == before
    vm.io("vda", "read -P 3 2M 1M")
    held.backup()


@pytest.mark.parametrize("merged", [pytest.param("at once", marks=pytest.mark.soak), "live, by the next run", "off"])
def test_a_disk_that_was_shrunk_off_line_and_is_grown_live_shows_nothing_of_what_was_cut_off(
    lab, runs, chain, merged, caplog
):
    vm = lab.vm(["raw:16"])
    vm.io("vda", "write -P 0x55 0 16M")
    held = chain(vm)
    held.backup()
    vm.destroy()
    qemu_img("resize", "-q", "-f", "qcow2", "--shrink", files(vm, "vda")[0], "8M")
    vm.start()

    def grow() -> None:
        vm.domain.blockResize("vda", 16 * MiB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
        vm.io("vda", "read -P 0 8M 8M")

    if merged == "at once":
        grow()
        held.backup()
    else:
        run = runs.run(vm, settings=SNAPSHOT)
        with runs.take(run):
            grow()
        assert "was made smaller and has grown since" in caplog.text
        vm.io("vda", "read -P 0 8M 8M", "write -P 0x66 8M 64k", "write -P 0 8M 64k")
        if merged == "off":
            vm.destroy()
            settle(held, run, RunState.RECORDED)
            vm.start()
        else:
            with runs.take(runs.run(vm, settings=SNAPSHOT)):
                pass
    vm.io("vda", "read -P 0x55 0 8M", "read -P 0 8M 8M")
    assert len(files(vm, "vda")) == 2
    runs.hypervisor.forget(vm.identity)
    vm.io("vda", "read -P 0x55 0 8M", "read -P 0 8M 8M")


@pytest.mark.parametrize("on", [True, False])
def test_a_disk_that_was_cut_within_a_cluster_shows_nothing_of_its_old_end_when_it_has_grown(lab, runs, chain, on):
    # QEMU's commit lets the file below grow, and its last cluster still holds what was cut off.
    vm = lab.vm(["qcow2:16"], start=False)
    vm.write("vda", "write -P 0x55 0 16M")
    vm.resize("vda", "--shrink", 8 * MiB + 512)
    vm.start()
    held = chain(vm)
    held.backup()
    vm.domain.blockResize("vda", 16 * MiB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    grown = ["read -P 0x55 0 8389120", "read -P 0 8389120 8388096"]
    vm.io("vda", *grown)
    if not on:
        vm.destroy()
    held.backup()
    vm.write("vda", *grown)
    runs.hypervisor.forget(vm.identity)
    vm.write("vda", *grown)


def test_the_end_of_a_cluster_that_cannot_be_cleared_is_told(tmp_path):
    plain, small = str(tmp_path / "plain.qcow2"), str(tmp_path / "small.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", plain, "200k")
    image_tail.clear(plain, "qcow2")  # it holds nothing
    qemu_io(plain, "write -P 9 0 200k")
    qemu_img("convert", "-c", "-O", "qcow2", plain, small)
    with pytest.raises(UnsupportedOperation, match="its last cluster is compressed"):
        image_tail.clear(small, "qcow2")
    qemu_img("snapshot", "-c", "somebody's", plain)
    with pytest.raises(UnsupportedOperation, match="is a snapshot's"):
        image_tail.clear(plain, "qcow2")
    parts = tmp_path / "parts.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "extended_l2=on", str(parts), "200k")
    qemu_io(str(parts), "write -P 9 198k 2k")  # in the middle of the last cluster: its first part is not there
    before = parts.read_bytes()
    with pytest.raises(UnsupportedOperation, match="has subclusters"):
        image_tail.clear(str(parts), "qcow2")
    assert parts.read_bytes() == before


def test_a_disk_that_was_shrunk_on_the_overlay_of_a_dead_run_keeps_it_until_the_next_backup(lab, chain, caplog):
    vm = lab.vm(["raw:16"])
    vm.io("vda", "write -P 0x55 0 16M")
    held = chain(vm)
    held.backup()
    run = killed(held, recorded=False)
    vm.destroy()
    qemu_img("resize", "-q", "-f", "qcow2", "--shrink", files(vm, "vda")[0], "8M")
    vm.start()
    settle(held, run, RunState.FAILED)
    assert ("was made smaller" in caplog.text, len(beside(vm))) == (True, 2)
    vm.io("vda", "write -P 0x66 1M 64k")
    with pytest.raises(IncrementImpossible, match="it has shrunk"):
        held.backup()
    held = chain(vm)
    held.backup()
    assert beside(vm) == [Path(files(vm, "vda")[0]).name]


def test_a_dead_run_that_is_settled_late_leaves_the_overlays_of_later_runs(lab, chain):
    """One disk could not be merged for long; of the others nothing of the dead run is left to be seen."""
    vm, other = lab.vm(["raw:16", "raw:16"]), lab.vm(["qcow2:16"], start=False)
    held = chain(vm)
    held.backup()
    vm.io("vda", "write -P 1 1M 64k")
    dead = killed(held, recorded=True)
    plain, used = str(other.disk("vda")), files(vm, "vdb")[1]
    other.change((plain, used))
    for _ in range(2):
        with pytest.raises(HypervisorError, match="it is used by VM"):
            settle(held, dead, RunState.RECORDED)
    vm.io("vda", "write -P 2 2M 64k")
    later = held.runs.run(vm, held.parent, settings=SNAPSHOT, spent=(held.taken[0].run.point,))
    with pytest.raises(HypervisorError, match="it is used by VM"), held.runs.take(later):
        pass
    with pytest.raises(HypervisorError, match="it is used by VM"):
        settle(held, dead, RunState.RECORDED)
    assert [len(files(vm, disk)) for disk in ("vda", "vdb")] == [2, 4], "what the next increment reads is still there"
    other.change((used, plain))
    settle(held, dead, RunState.RECORDED)
    settle(held, later, RunState.RECORDED)
    assert [files(vm, disk)[0] for disk in ("vda", "vdb")] == [name(vm, disk, later, "raw") for disk in ("vda", "vdb")]
    assert len(beside(vm)) == 2
