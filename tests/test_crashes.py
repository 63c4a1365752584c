"""What dies beside vmkeep: QEMU, the datastore, and the room for scratch. The guest's disks and the chain survive."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import libvirt
import pytest

from lab import graft
from lab.boot_sector import boot_sector
from lab.domain_xml import DiskSpec
from lab.host import RUNNING, Host, stopped, wait_until
from lab.troubles import free, guard_of
from tests.test_killed import STEPS

MIB = 1 << 20
pytestmark = pytest.mark.timeout(600)  # for a loaded machine


@pytest.fixture
def host(make_vm, libvirt_uri: str, vm_folder: Path) -> Host:
    vm = make_vm([DiskSpec(target="vda", size=32 * MIB), DiskSpec(target="vdb", size=16 * MIB)], label="crash")
    vm.io("vda", "write -P 0x55 1M 8M")
    vm.io("vdb", "write -P 0x11 0 2M")
    return Host(vm_folder, vm, libvirt_uri, driver="lab")


def kill_qemu(host: Host) -> None:
    os.kill(int(Path(f"/run/libvirt/qemu/{host.vm.name}.pid").read_text()), signal.SIGKILL)
    wait_until(lambda: not host.vm.active, "libvirt to notice that QEMU has died")


def test_qemu_dies_in_the_middle_and_bitmaps_are_missing_then_in_use(host: Host):
    truths = [host.note_truth("0")]
    host.backup()
    host.vm.io("vda", "write -P 0x66 1M 24M")  # more than is read ahead: what has come by then needs no QEMU
    process = host.start("--json", "backup", host.vm.name, at=STEPS["reading"], stop=True)
    wait_until(partial(stopped, process.pid), "the middle of a backup")
    kill_qemu(host)
    process.send_signal(signal.SIGCONT)
    failed = host.end(process)
    assert failed.code == 11, failed.err
    host.vm.start()
    # The bitmap that was made in the run of QEMU that crashed was never written.
    truths.append(host.note_truth("1"))
    taken = host.backup()
    assert "bitmap of the last backup is missing" in taken["reason"]
    assert host.left() == []
    # One that was once written is marked as in use, and stays so after a crash.
    host.vm.destroy()
    host.vm.start()
    host.vm.io("vda", "write -P 0x67 4M 1M")
    kill_qemu(host)
    host.vm.start()
    truths.append(host.note_truth("2"))
    taken = host.backup()
    assert "inconsistent" in taken["reason"], taken
    assert host.left() == []
    host.vm.io("vdb", "write -P 0x68 5M 1M")
    truths.append(host.note_truth("3"))
    assert host.backup()["type"] == "INCREMENT"
    for one, truth in zip(host.recorded(), truths, strict=True):
        assert host.differing(one.image, one.id, truth) == [], one


def test_a_plugin_that_closes_every_file_ends_the_run_at_once(host: Host):
    """libvirt's own close of a connection whose descriptor is another's by now waits for ever."""
    for step, code, told, recorded in (
        ("backup after", 1, "a plugin closes files that are not its own", 0),
        # Our standard output is among them.
        ("postbackup before", 1, "a plugin has closed files that are not its own", 1),
    ):
        host.configure(host='plugins = ["lab.closing:faults"]')
        began = time.monotonic()
        done = host.run("backup", host.vm.name, LAB_CLOSE=step)
        assert time.monotonic() - began < 30, f"{step}: {done.err}"
        assert (done.code, told in done.err, len(host.recorded())) == (code, True, recorded), done.err
        wait_until(partial(free, host), "the guest to run", 10)
        host.configure()
        assert host.run("recover", host.vm.name).code == 0
        assert (host.left(), len(host.recorded())) == ([], recorded), step
    assert host.backup()["type"] == "INCREMENT"


def test_somebody_ends_the_job_before_the_disks_are_read(host: Host):
    process = host.start("backup", host.vm.name, at="backupcore_libvirt.reading.process:reader_of return", stop=True)
    wait_until(partial(stopped, process.pid), "the backup to have begun")
    host.vm.domain.abortJob()
    wait_until(lambda: not host.vm.domain.jobInfo()[0], "the end of the job")
    process.send_signal(signal.SIGCONT)
    failed = host.end(process)
    assert failed.code == 11
    assert f"VM {host.vm.name}: its backup job was ended by somebody else" in failed.err
    assert "/" not in failed.err.splitlines()[-2], "no path of ours says anything to an admin"
    assert host.left() == []
    assert host.backup()["type"] == "FULL"


def test_the_datastore_dies_in_the_middle(host: Host):
    host.backup()
    checkpoints = host.checkpoints()
    host.vm.io("vda", "write -P 0x66 3M 4M")
    process = host.start("--json", "backup", host.vm.name, at=STEPS["reading"], stop=True)
    wait_until(partial(stopped, process.pid), "the middle of a backup")
    store = host.folder / "store"
    store.rename(host.folder / "away")
    process.send_signal(signal.SIGCONT)
    failed = host.end(process)
    assert failed.code == 5, failed.err
    assert "TargetUnavailable" in failed.err
    assert host.left() == []
    assert host.checkpoints() == checkpoints
    assert host.vm.domain.state()[0] == RUNNING
    shutil.rmtree(store, ignore_errors=True)
    (host.folder / "away").rename(store)
    truth = host.note_truth("after")
    taken = host.backup()
    assert taken["type"] == "INCREMENT"
    assert host.differing(taken["image"], taken["increment"], truth) == []
    assert not list(store.glob(".*.part")), "nothing half is left"


@pytest.fixture
def small_scratch(vm_folder: Path) -> Iterator[Path]:
    """Scratch on a file system of 3 MiB; QEMU sees it where the VM starts afterwards."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    scratch = vm_folder / "scratch"
    scratch.mkdir()
    graft.mount_tmpfs(scratch, 3)
    yield scratch
    graft.unmount(scratch)


def test_recover_lets_a_guest_go_on_that_full_scratch_has_stopped(
    make_vm, libvirt_uri: str, vm_folder: Path, small_scratch: Path
):
    boot = vm_folder / "boot.raw"
    boot.write_bytes(boot_sector(30_000).ljust(15 * MIB, b"\x11"))
    vm = make_vm([DiskSpec(target="vda", size=16 * MIB, content=boot)], label="full")
    host = Host(vm_folder, vm, libvirt_uri, driver="lab")

    def writes() -> int:
        return int(vm.domain.blockStats("vda")[2])

    wait_until(lambda: writes() > 50, "the guest to write")
    process = host.start("backup", vm.name, at=STEPS["the instant"], stop=True)
    wait_until(partial(stopped, process.pid), "the instant")
    guard = guard_of(process.pid)
    os.kill(guard, signal.SIGKILL)  # else it would let the guest go on
    process.kill()
    assert host.end(process).code == -signal.SIGKILL
    stands_still = [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR]
    wait_until(lambda: vm.domain.state() == stands_still, "QEMU to stop the guest")
    (told,) = host.ask("recover", vm.name)
    assert any(line.startswith("let the guest go on") for line in told["did"]), told
    before = writes()
    wait_until(lambda: writes() > before + 50, "the guest to write again")
    assert host.left() == []
