"""Backups of running VMs, compared byte for byte with what QEMU's own tools copied."""

from __future__ import annotations

import io
import subprocess
from datetime import UTC, datetime
from xml.etree import ElementTree

import libvirt
import pytest

from backupcore.disk.extents import Kind
from backupcore.errors import HypervisorError
from backupcore.model import RunState

MiB = 1 << 20


def test_full_and_increments_equal_what_the_disks_held_at_one_instant(lab, runs, hypervisor, same, tmp_path):
    vm = lab.vm(["qcow2:64", "qcow2:33"])
    vm.io("vda", "write -P 0x11 0 8M")
    vm.io("vda", "write -P 0x12 30M 1M")
    vm.io("vdb", "write -P 0x13 32M 1M")
    layers, truths, parent, taken_runs = [], [], None, []
    changes = [
        [],
        [
            ("vda", "write -P 0x21 1M 64k"),
            ("vda", "write -z 2M 1M"),  # zeros that are allocated
            ("vda", "write -z -u 4M 1M"),
            ("vda", "discard 6M 1M"),
            ("vda", "write -P 0x22 40000k 512"),  # less than a cluster
            ("vdb", "write -P 0x23 33500k 292k"),
        ],
        [("vda", "write -P 0x31 2500k 128k"), ("vda", "write -P 0x32 30M 4k"), ("vdb", "discard 32M 512k")],
    ]
    for number, change in enumerate(changes):
        for disk, command in change:
            vm.io(disk, command)
        truths.append(vm.copy_truth(tmp_path / f"truth{number}"))
        run = runs.run(vm, parent, spent=tuple(r.point for r in taken_runs[:-1]))
        before = datetime.now(UTC)
        with runs.take(run) as taken:
            assert before <= taken.prepared.date <= datetime.now(UTC)
            # What the guest writes from here on is no part of the backup.
            vm.io("vda", "write -P 0x77 0 1M")
            vm.io("vdb", "write -P 0x78 0 1M")
            layers.append(runs.keep(taken, tmp_path / f"layer{number}"))
            vm.io("vda", "write -P 0x11 0 1M" if not number else "write -P 0x79 0 1M")
        # The writes during the backup belong to the next point.
        parent = taken
        taken_runs.append(run)
        assert vm.job() == 0
        same(layers, truths[-1])
        assert taken.prepared.consistency == "crash"
        assert taken.prepared.frozen_seconds == 0.0
        assert [(d.id, d.virtual_size, d.whole) for d in taken.prepared.disks] == [
            ("vda", 64 * MiB, not number),
            ("vdb", 33 * MiB, not number),
        ]
        kept = {f"backupcore-{r.point}" for r in taken_runs[-2:]}
        assert vm.checkpoints() == kept
        assert vm.bitmaps() == {"vda": sorted(kept), "vdb": sorted(kept)}
    for restore_to in range(3):
        same(layers[: restore_to + 1], truths[restore_to])
    # Increments hold changes only: of the second one 2500k to 2628k, 30M, and the first MiB.
    layout = parent.prepared.artifacts[0].layout
    assert sum(e.length for e in layout.extents() if e.kind is Kind.DATA) <= MiB + 5 * 65536


def test_all_disks_show_one_instant_of_a_guest_that_writes(counting_vm, runs, restored, tmp_path, wait_for):
    vm = counting_vm()
    parent, layers, seen = None, [], 0
    for number in range(4):
        before = vm.domain.blockStats("vdb")[2]
        wait_for(lambda before=before: vm.domain.blockStats("vdb")[2] > before + 10, "the guest writes", 30)
        with runs.take(runs.run(vm, parent)) as parent:
            layers.append(runs.keep(parent, tmp_path / f"layer{number}"))
        files = [restored([layer[disk] for layer in layers], tmp_path / disk) for disk in ("vda", "vdb")]
        first, second = (int.from_bytes(file.read_bytes()[MiB : MiB + 4], "little") for file in files)
        assert first - second in (0, 1), "the second disk is at most one write behind the first"
        assert second > seen
        seen = second


def test_artifacts_versions_and_what_is_left_out(lab, runs, hypervisor):
    image = lab.folder / "shared.raw"
    image.write_bytes(bytes(MiB))
    vm = lab.vm(
        ["qcow2:8"],
        more=f"""<graphics type='vnc' passwd='geheim'/>
        <disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>
        <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{image}'/>
        <target dev='vdx' bus='virtio'/><readonly/></disk>""",
    )
    with runs.take(runs.run(vm)) as taken:
        artifacts = {artifact.name: artifact for artifact in taken.prepared.artifacts}
        assert sorted(artifacts) == ["disk.vda.qcow2", "vm.xml"]
        definition = artifacts["vm.xml"].open().read()
        assert sorted(taken.prepared.versions) == ["backupcore-libvirt", "libvirt", "qemu"]
        assert {left.id: left.reason for left in taken.prepared.left_out} == {"sda": "a CD-ROM", "vdx": "read-only"}
    assert ElementTree.fromstring(definition).findtext("name") == vm.name
    assert b"geheim" not in definition
    assert b"<seclabel type='dynamic' model='dac'" not in definition, "the inactive definition"
    shown = {disk.id: disk for disk in hypervisor.find(vm.name).disks}
    assert (shown["vda"].left_out, shown["vdx"].left_out) == ("", "read-only")


def test_raw_disks(lab, runs, same, tmp_path):
    vm = lab.vm(["raw:16", "qcow2:16"])
    vm.io("vda", "write -P 0x41 3M 1M")
    vm.io("vdb", "write -P 0x42 5M 1M")
    truth = vm.copy_truth(tmp_path / "truth")
    run = runs.run(vm)
    with runs.take(run) as taken:
        layer = runs.keep(taken, tmp_path / "layer")
    same([layer], truth)
    assert vm.bitmaps() == {"vdb": [f"backupcore-{run.point}"]}


def test_an_untracked_run_makes_no_checkpoint(small, runs):
    with runs.take(runs.run(small, tracked=False)):
        assert small.job() != 0
    small.untouched()


def test_a_paused_vm(small, runs, same, tmp_path):
    vm = small
    vm.io("vda", "write -P 0x51 3M 1M")
    vm.domain.suspend()
    truth = vm.copy_disks(tmp_path / "truth")
    with runs.take(runs.run(vm)) as taken:
        layer = runs.keep(taken, tmp_path / "layer")
        assert taken.prepared.consistency == "paused"
    same([layer], truth)
    assert vm.domain.state()[0] == 3, "still paused"


def test_a_disk_that_has_grown_and_one_with_a_bitmap_finer_than_a_cluster(lab, runs, same, tmp_path):
    vm = lab.vm(["qcow2:16", "qcow2:16"], start=False)
    small_clusters = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", str(vm.disk("vdb")), "16M"]
    subprocess.run(small_clusters, check=True)
    vm.start()
    vm.io("vda", "write -P 0x61 15M 1M")
    vm.io("vdb", "write -P 0x71 0 4M")
    with runs.take(runs.run(vm)) as full:
        layers = [runs.keep(full, tmp_path / "layer0")]
    vm.domain.blockResize("vda", 40 * MiB + 512, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    vm.io("vda", "write -P 0x62 39M 512k")
    vm.io("vdb", "write -z 72k 4k")
    vm.io("vdb", "write -P 0x72 100k 512")
    truth = vm.copy_truth(tmp_path / "truth")
    with runs.take(runs.run(vm, full)) as taken:
        layers.append(runs.keep(taken, tmp_path / "layer1"))
    assert taken.prepared.disks[0].virtual_size == 40 * MiB + 512
    same(layers, truth)


def test_the_guest_ends_while_its_disk_is_read(lab, runs, wait_for):
    vm = lab.vm(["qcow2:64"])
    vm.io("vda", "write -P 0x11 0 32M")
    run = runs.run(vm)
    with runs.take(run, state=RunState.FAILED) as taken:
        stream: io.BufferedReader = taken.prepared.artifacts[0].open()
        stream.read(4 * MiB)
        vm.destroy()
        with pytest.raises(HypervisorError, match="connection"):
            stream.read()
        wait_for(lambda: taken.ctx.failure, "the watch notices")
        assert f"VM {vm.name} ended while its backup ran" in str(taken.ctx.failure)
    assert vm.checkpoints() == set(), "the checkpoint went, although the VM is off"
    info = subprocess.run(["qemu-img", "info", str(vm.disk("vda"))], capture_output=True, text=True, check=True).stdout
    assert run.point not in info
    vm.start()
    vm.untouched()
    with runs.take(runs.run(vm)):
        pass


def test_a_failed_run_leaves_no_checkpoint_and_keeps_the_parent(small, runs):
    vm = small
    with runs.take(runs.run(vm)) as full:
        pass
    with runs.take(runs.run(vm, full, spent=(full.run.point,)), state=RunState.CANCELLED):
        assert len(vm.checkpoints()) == 2
    assert vm.checkpoints() == {f"backupcore-{full.run.point}"}
    with runs.take(runs.run(vm, full)):
        pass
