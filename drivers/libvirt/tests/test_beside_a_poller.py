"""Live backups of VMs whose statistics others ask for all the while.

QEMU 7.2 dies of that (`qcow2.c: qcow2_get_specific_info: Assertion`, in `query-named-block-nodes`) while it makes an
image for libvirt, so our images are made beforehand.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MiB = 1 << 20
HERE = Path(__file__).parent
LIVE = (
    "backup",
    "disk_by_disk",
    "freeze",
    "healing",
    "place",
    "premade",
    "release",
    "snapshot_mode",
    "temporary_overlays",
    "whole_run",
)


def alive(vm) -> None:
    assert vm.active, f"the guest is dead:\n{vm._log().read_text()[-1500:]}"
    assert vm.monitor("query-status")["running"]


@pytest.mark.parametrize(("disks", "rounds"), [(1, 8), pytest.param(6, 3, marks=pytest.mark.soak), (20, 2)])
def test_fulls_and_increments(disks, rounds, lab, runs, poller, same, tmp_path):
    vm = lab.vm(["qcow2:4"] * disks)
    layers, parent = [], None
    for number in range(rounds):
        vm.io("vda", f"write -P {number + 1} {number * 64}k 64k")
        with runs.take(runs.run(vm, parent)) as parent:
            alive(vm)
            layers.append(runs.keep(parent, tmp_path / f"layer{number}"))
        alive(vm)
    same(layers, vm.copy_truth(tmp_path / "truth"))


@pytest.mark.parametrize("shape", [pytest.param("raw", marks=pytest.mark.soak), "qcow2"])
def test_overlays(shape, lab, runs, poller):
    vm = lab.vm([f"{shape}:4"] * 3)
    parent = None
    for number in range(4):
        vm.io("vda", f"write -P {number + 1} {number * 64}k 64k")
        run = runs.run(vm, parent, settings={"INCREMENT_MODE": "SNAPSHOT"})
        with runs.take(run) as parent:
            alive(vm)
        alive(vm)


@pytest.mark.soak
def test_overlays_of_disks_with_an_io_thread(lab, runs, poller):
    """For the time of a run each, where this QEMU would not survive a backup job."""
    vm = lab.vm(["qcow2:4", "raw:4", "qcow2:4"], iothread="disk")
    parent = None
    for _ in range(4):
        with runs.take(runs.run(vm, parent)) as parent:
            alive(vm)
        alive(vm)


def test_a_guest_that_stands_still_meanwhile(lab, runs, poller):
    vm = lab.vm(["qcow2:4"] * 6)
    for _ in range(3):
        with runs.take(runs.run(vm, settings={"FS_FREEZE": "SUSPEND"})) as taken:
            assert taken.prepared.consistency == "paused"
            alive(vm)
        alive(vm)


@pytest.mark.soak
def test_the_live_suite():
    files = [str(HERE / f"test_{name}.py") for name in LIVE]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--timeout", "300", *files],
        env={**os.environ, "LAB_POLLER": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
