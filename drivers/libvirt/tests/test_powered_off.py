"""Backups of VMs that are off, and chains that go on while VMs are started and switched off."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys

import libvirt
import pytest

from backupcore.errors import Busy, UnsupportedOperation
from backupcore.model import Outcome, RunState, Type
from backupcore_libvirt import stopped
from backupcore_libvirt.connection import Connection
from backupcore_libvirt.disks import source_disks
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.mechanisms.choice import choose

MiB = 1 << 20


@pytest.mark.parametrize("order", ["off off on on off", "on off on off off"])
def test_chains_through_starts_and_stops_are_restored_to_every_point(order, lab, chains):
    vm = lab.vm(["qcow2:32", "qcow2:9", "raw:4"], start=False)
    vm.write("vda", "write -P 0x11 0 6M", "write -P 0x12 20M 1M")
    vm.write("vdc", "write -P 0x13 1M 1M")
    for number, state in enumerate(order.split()):
        if number:
            # Off, then on, then off again: whoever writes, and whatever state follows, the bitmap must know.
            vm.write(
                "vda", f"write -P {0x20 + number} {number}M 1500k", "write -z 3M 64k", f"discard {number + 3}M 64k"
            )
        if (state == "on") is not vm.active:
            vm.start() if state == "on" else vm.destroy()
        vm.write("vda", f"write -P {0x30 + number} {number + 10}M 100k")
        vm.write("vdb", f"write -P {0x40 + number} {number * 100}k 1k", "write -z 0 64k")
        vm.write("vdc", f"write -P {0x50 + number} {number * 64}k 64k")
        recorded = chains.backup(vm)
        assert recorded.increment.consistency == ("crash" if state == "on" else "off")
        assert recorded.run.type is (Type.INCREMENT if number else Type.FULL), recorded.run.reason
        whole = {disk.id: (disk.whole, disk.reason) for disk in recorded.increment.disks}
        if number:
            assert (whole["vda"], whole["vdb"]) == ((False, ""), (False, ""))
            assert whole["vdc"] == (True, "raw: changed blocks are tracked in qcow2 only")
            assert recorded.read <= 5 * MiB, "what has changed, and the raw disk"
        points = sorted(f"backupcore-{one.point}" for one in chains.images[0].increments[-2:])
        assert vm.bitmaps() == {"vda": points, "vdb": points}
        assert vm.checkpoints() <= set(points)
    chains.check()


def test_a_vm_that_is_off_shows_that_it_is_read_and_starts_afterwards(lab, runs, hypervisor):
    vm = lab.vm(["qcow2:8", "qcow2:8"], start=False)
    assert not hypervisor.find(vm.name).being_read
    with runs.take(runs.run(vm)):
        found = hypervisor.find(vm.name)
        assert (found.state, found.being_read) == ("off", True)
        assert [state.being_read for state in hypervisor.vms() if state.vm.name == vm.name] == [True]
        # QEMU's word for it, unless it has ended before libvirt was connected to it.
        with pytest.raises(libvirt.libvirtError, match='Failed to get "write" lock|failed to connect to monitor'):
            vm.start()
    assert not hypervisor.find(vm.name).being_read
    with runs.take(runs.run(vm), state=RunState.FAILED):
        pass
    assert [len(names) for names in vm.bitmaps().values()] == [1, 1], "only that of the first"
    vm.start()


def test_a_vm_of_raw_disks_does_not_start_while_it_is_read(lab, runs):
    """QEMU's own reader of a raw file keeps nobody from writing to it."""
    vm = lab.vm(["raw:8"], start=False)
    refused = pytest.raises(libvirt.libvirtError, match='Failed to get "write" lock|failed to connect to monitor')
    with runs.take(runs.run(vm)), refused:
        vm.start()
    vm.start()


def test_a_vm_with_saved_memory(lab, chains):
    vm = lab.vm(["qcow2:8"])
    vm.write("vda", "write -P 0x11 0 1M")
    chains.backup(vm)
    vm.write("vda", "write -P 0x12 1M 1M")
    vm.domain.managedSave()
    assert chains.hypervisor.find(vm.name).state == "saved"
    recorded = chains.backup(vm)
    assert (recorded.run.type, recorded.increment.consistency) == (Type.INCREMENT, "crash")
    with chains.context() as ctx:
        run = chains.plan(vm)
        chains.hypervisor.prebackup(run, ctx)
        with pytest.raises(libvirt.libvirtError):
            vm.start()
        chains.hypervisor.postbackup(run, Outcome(state=RunState.FAILED), ctx)
    assert vm.domain.hasManagedSaveImage(), "a start that was refused does not cost the memory"
    vm.start()
    assert vm.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
    vm.write("vda", "write -P 0x13 2M 1M")
    assert chains.backup(vm).run.type is Type.INCREMENT
    chains.check()


def test_backing_chains_of_a_vm_that_is_off(lab, chains, runs):
    vm = lab.vm(["qcow2:8"], start=False)
    top, base = vm.disk("vda"), vm.disk("vda").with_name("base.qcow2")
    vm.write("vda", "write -P 0x11 0 1M")
    top.rename(base)

    def overlay(*shape: str) -> None:
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", *shape, str(top), "8M"]
        subprocess.run(command, check=True)  # the name of the backing file is relative

    overlay("-F", "qcow2")
    vm.write("vda", "write -P 0x12 512k 1M", "write -z 0 64k")
    chains.backup(vm)
    vm.write("vda", "write -P 0x13 3M 64k")
    assert chains.backup(vm).run.type is Type.INCREMENT
    chains.check()
    # Older QEMUs made images that do not say it: without its header extension (0xE2792ACA) this is one.
    top.write_bytes(top.read_bytes().replace(b"\xe2\x79\x2a\xca", b"\xe2\x79\x2a\xcb", 1))
    with pytest.raises(UnsupportedOperation, match="does not say which format its backing file") as refused:
        chains.hypervisor.estimate(chains.plan(vm))
    assert "qemu-img rebase -u -F FORMAT" in refused.value.hint
    top.unlink()
    data = top.with_name("data")
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", top, "8M"]
    subprocess.run(command, check=True)
    data.chmod(0o600)  # as root has made it, so that QEMU's user cannot read it
    if os.geteuid() == 0:
        with pytest.raises(UnsupportedOperation, match="keeps its data in another file .*cannot read"):
            chains.hypervisor.estimate(chains.plan(vm))
    data.chmod(0o644)
    assert not chains.hypervisor.estimate(chains.plan(vm, reset=True)).left_out


@pytest.mark.timeout(60)
@pytest.mark.parametrize("shape", ["raw", "qcow2"])
def test_a_fifo_in_place_of_a_disk_hangs_neither_us_nor_libvirt(shape, lab, runs, hypervisor):
    """libvirt reads the file of a VM that is off, if asked for its size, and answers nobody until that has ended."""
    vm = lab.vm([f"{shape}:8"], start=False)
    path = vm.disk("vda")
    path.unlink()
    os.mkfifo(path)
    (disk,) = hypervisor.find(vm.name).disks
    assert disk.virtual_size is None
    with pytest.raises(UnsupportedOperation, match=f"disk vda: {path} is a FIFO"):
        hypervisor.estimate(runs.run(vm))
    with pytest.raises(UnsupportedOperation, match="is a FIFO"), runs.take(runs.run(vm)):
        pass
    path.unlink()
    assert vm.checkpoints() == set()


def test_no_bitmap_stays_where_one_disk_cannot_get_it(lab, runs, monkeypatch):
    monkeypatch.setattr(stopped, "LOCK_LIMIT", 0.2)
    vm = lab.vm(["qcow2:8", "qcow2:8"], start=False)
    command = ["qemu-nbd", "-r", "-t", "-k", str(lab.folder / "s"), "-f", "qcow2", str(vm.disk("vdb"))]
    reader = subprocess.Popen(command)
    try:
        while not (lab.folder / "s").exists():
            assert reader.poll() is None
        for _ in range(2):
            with pytest.raises(Busy, match=r"disk vdb: .* is open in another process"), runs.take(runs.run(vm)):
                pass
            assert vm.bitmaps() == {"vda": [], "vdb": []}
        disks = [disk for disk in source_disks(vm.domain.XMLDesc()) if not disk.left_out]
        with pytest.raises(Busy, match="disk vdb: "):
            stopped.add_bitmaps(disks, "some")
        assert vm.bitmaps() == {"vda": [], "vdb": []}
    finally:
        reader.kill()
        reader.wait()
    with runs.take(runs.run(vm)):
        pass


def test_a_vm_that_is_started_after_the_look(lab, runs, hypervisor, monkeypatch):
    monkeypatch.setattr(stopped, "LOCK_LIMIT", 0.2)
    vm = lab.vm(["qcow2:8", "qcow2:8"], start=False)
    run = runs.run(vm)
    with runs.context(run) as ctx, Connection(hypervisor.uri) as connection:
        folder = RunFolder(hypervisor.scratch, run.id)
        mechanism = choose(connection, connection.domain(vm.uuid), run, hypervisor.scratch, ctx)
        ctx.stack.callback(os.close, folder.make(mechanism.look.owner, vm.uuid))
        vm.start()
        with pytest.raises(Busy, match="disk vda: .* is open in another process") as refused:
            mechanism.begin()
        assert "Has the VM just been started" in refused.value.hint
        hypervisor.postbackup(run, Outcome(state=RunState.FAILED), ctx)
    vm.untouched()
    with runs.take(runs.run(vm)):
        pass


def test_an_estimate_of_a_vm_that_is_off(lab, runs, hypervisor):
    vm = lab.vm(["qcow2:8", "raw:8", "qcow2v2:8"], start=False)
    vm.write("vda", "write -P 0x11 0 1M")
    with pytest.raises(UnsupportedOperation, match="disk vdc is qcow2 version 2") as refused:
        hypervisor.estimate(runs.run(vm))
    assert "qemu-img amend" in refused.value.hint
    subprocess.run(["qemu-img", "amend", "-f", "qcow2", "-o", "compat=1.1", vm.disk("vdc")], check=True)
    disks = hypervisor.estimate(runs.run(vm)).disks
    assert [disk.whole for disk in disks] == [True, True, True]
    assert MiB <= disks[0].bytes < 2 * MiB
    with runs.take(runs.run(vm)) as full:
        pass
    vm.write("vda", "write -P 0x12 2M 1M")
    disks = hypervisor.estimate(runs.run(vm, full)).disks
    assert [(disk.id, disk.whole, disk.reason[:3]) for disk in disks] == [
        ("vda", False, ""),
        ("vdb", True, "raw"),
        ("vdc", False, ""),
    ]
    vm.start()
    disks = hypervisor.estimate(runs.run(vm, full)).disks
    assert disks[0].bytes == MiB, "of a running VM QEMU tells it"
    assert vm.checkpoints() == set(), "an estimate touches nothing"


PREBACKUP = """
import sys, pathlib, pickle
from backupcore.context import Context
from backupcore_libvirt.plugin import Libvirt
uri, scratch, folder, run = sys.argv[1:]
with Context(pathlib.Path(folder)) as ctx:
    Libvirt(uri, pathlib.Path(scratch)).prebackup(pickle.loads(bytes.fromhex(run)), ctx)
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("next_is", ["the release", "a backup"])
def test_killed_while_it_reads_a_vm_that_is_off(next_is, lab, runs, hypervisor, tmp_path, wait_for):
    vm = lab.vm(["qcow2:8", "qcow2:8"], start=False)
    dead = runs.run(vm, settings={})
    process = subprocess.Popen(
        [sys.executable, "-c", PREBACKUP, hypervisor.uri, hypervisor.scratch, tmp_path, pickle.dumps(dead).hex()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    name = f"backupcore-{dead.point}"
    if next_is == "the release":
        for _ in range(2):
            with runs.context(dead) as ctx:
                hypervisor.postbackup(dead, Outcome(state=RunState.FAILED), ctx)
            (runs.folder / dead.id).rmdir()
        assert vm.bitmaps() == {"vda": [], "vdb": []}
        assert not list(hypervisor.scratch.iterdir())
    else:
        with runs.take(runs.run(vm, keep=())) as taken:
            assert set(vm.bitmaps()["vda"]) == {name, f"backupcore-{taken.run.point}"}
        assert vm.bitmaps()["vdb"] == [f"backupcore-{taken.run.point}"]
    vm.start()


def test_the_vm_is_switched_off_while_it_is_read_and_the_next_increment_is_taken_off(lab, chains, wait_for):
    vm = lab.vm(["qcow2:16", "qcow2:4"])
    vm.write("vda", "write -P 0x11 0 8M")
    chains.backup(vm)
    vm.write("vda", "write -P 0x12 4M 8M")
    run = chains.plan(vm)
    with chains.context() as ctx:
        prepared = chains.hypervisor.prebackup(run, ctx)
        vm.destroy()
        wait_for(lambda: ctx.failure, "the watch notices")
        for artifact in prepared.artifacts:
            artifact.close()
        chains.hypervisor.postbackup(run, Outcome(state=RunState.FAILED), ctx)
    assert vm.bitmaps() == {disk: [f"backupcore-{chains.kept[0]}"] for disk in ("vda", "vdb")}
    for _ in range(2):
        assert chains.backup(vm).run.type is Type.INCREMENT
        vm.start() if not vm.active else vm.destroy()
    chains.check()


def test_a_device_that_another_vm_writes_to_is_not_read(lab, runs, loop, wait_for):
    mine, other = (lab.vm(["raw:8"], start=False, devices={"vda": loop}) for _ in range(2))
    other.start()
    with pytest.raises(Busy, match="is open for writing in qemu"), runs.take(runs.run(mine)):
        pass
    other.destroy()
    with runs.take(runs.run(mine)) as taken:
        assert taken.prepared.consistency == "off"
    with runs.take(runs.run(mine), state=RunState.FAILED) as taken:
        other.start()
        wait_for(lambda: taken.ctx.failure, "the watch notices", 60)
    assert isinstance(taken.ctx.failure, Busy)
    assert "open for writing in qemu" in taken.ctx.failure.message


def test_a_vm_on_a_block_device_that_is_started_while_it_is_read_ends_the_backup(lab, runs, loop, wait_for):
    """libvirt gives the VM a device node of its own, so QEMU's lock on the one that is read does not hinder it."""
    disk = (
        f"<disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='{loop}'/>"
        "<target dev='vda' bus='virtio'/><alias name='ua-vda'/></disk>"
    )
    vm = lab.vm([], more=disk, start=False)
    with runs.take(runs.run(vm)) as taken:
        pass
    assert taken.ctx.failure is None
    with runs.take(runs.run(vm), state=RunState.FAILED) as taken:
        vm.start()
        wait_for(lambda: taken.ctx.failure, "the watch notices", 60)
    assert isinstance(taken.ctx.failure, Busy)
    assert "was started while its disks were read" in taken.ctx.failure.message
    with runs.take(runs.run(vm)) as taken:
        assert taken.prepared.consistency == "crash"
