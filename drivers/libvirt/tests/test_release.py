"""The release of the guest: after kill -9, beside somebody who is connected, and when scratch fills."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import libvirt
import pytest

from backupcore.errors import Busy, HypervisorError, TargetFull
from backupcore.model import Outcome, RunState
from backupcore_libvirt import backup_job
from backupcore_libvirt.connection import Domain
from backupcore_libvirt.folder import RunFolder, dead_folders, living_vms
from backupcore_libvirt.plugin import Libvirt
from backupcore_libvirt.release.clients import connected
from backupcore_libvirt.scratch import Owner
from lab.boot_sector import boot_sector
from lab.patience import patient

MiB = 1 << 20

PREBACKUP = """
import sys, pathlib
from backupcore.context import Context
from backupcore.model import VM, BackupRun, Type
from backupcore_libvirt.plugin import Libvirt
from lab.boot_sector import boot_sector
uri, scratch, folder, uuid, name, run, point = sys.argv[1:]
run = BackupRun(id=run, vm=VM(uuid=uuid, name=name), host="here", datastore="nas", image="0" * 32, number=0,
                point=point, type=Type.FULL)
with Context(pathlib.Path(folder)) as ctx:
    prepared = Libvirt(uri, pathlib.Path(scratch)).prebackup(run, ctx)
    prepared.artifacts[0].read_at(0, prepared.artifacts[0].size)  # a connection that stays open
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_process(runs, tmp_path):
    """Starts a process that has done prebackup and holds a connection; it is killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(vm, run, *, ready: bool = True) -> subprocess.Popen[str]:
        arguments = [runs.hypervisor.uri, runs.hypervisor.scratch, tmp_path, vm.uuid, vm.name, run.id, run.point]
        process = subprocess.Popen(
            [sys.executable, "-c", PREBACKUP, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        started.append(process)
        assert process.stdout is not None
        assert not ready or process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_run_that_was_killed_is_cleared_away_by_the_next_one(small, runs, other_process, caplog, wait_for):
    small.io("vda", "write -P 0x11 0 1M")
    dead = runs.run(small)
    process = other_process(small, dead)
    with pytest.raises(Busy, match="another backup of this VM is running"), runs.take(runs.run(small)):
        pass
    assert small.job() != 0, "the living run was left alone"
    assert connected(small.job_socket()) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: small.job() == 0, "its guard ends the job")
    with caplog.at_level(logging.WARNING), runs.take(runs.run(small)) as taken:
        assert not (runs.hypervisor.scratch / dead.id).exists()
    assert f"removed {runs.hypervisor.scratch / dead.id}" in caplog.text
    # Its checkpoint is the catalog's affair: what it stored may yet be adopted.
    assert small.checkpoints() == {f"backupcore-{dead.point}", f"backupcore-{taken.run.point}"}
    small.monitor("query-status")


def test_postbackup_in_a_fresh_process_releases_all_and_can_be_repeated(small, runs, other_process):
    small.io("vda", "write -P 0x11 0 1M")
    dead = runs.run(small)
    process = other_process(small, dead)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(2):
        with runs.context(replace(dead)) as ctx:
            Libvirt(runs.hypervisor.uri, runs.hypervisor.scratch).postbackup(dead, Outcome(state=RunState.FAILED), ctx)
        shutil.rmtree(runs.folder / dead.id)
        small.untouched()
        assert list(runs.hypervisor.scratch.iterdir()) == []


def test_a_run_killed_at_any_moment_of_prebackup(small, runs, other_process, wait_for):
    small.io("vda", "write -P 0x11 0 1M")
    spent = []
    for milliseconds in (0, 30, 60, 120, 250):  # since its folder appeared: before, in and after the call that begins
        dead = runs.run(small)
        process = other_process(small, dead, ready=False)
        wait_for((runs.hypervisor.scratch / dead.id).exists, "the folder of the run")
        time.sleep(milliseconds / 1000)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with runs.take(runs.run(small, spent=(*spent, dead.point))) as taken:
            assert taken.prepared.artifacts[0].read_at(0, 1)
        spent = [taken.run.point]
        assert list(runs.hypervisor.scratch.iterdir()) == []
        assert small.checkpoints() == {f"backupcore-{taken.run.point}"}


def test_the_folder_of_a_run_that_was_killed_before_it_had_a_job_goes(small, runs, hypervisor):
    folder = RunFolder(hypervisor.scratch, "0" * 32)
    os.close(folder.make(Owner(os.geteuid(), os.getegid()), small.uuid))
    other = RunFolder(hypervisor.scratch, "1" * 32)
    lock = other.make(Owner(os.geteuid(), os.getegid()), small.uuid)  # of a run that lives
    with runs.take(runs.run(small)):
        assert not folder.path.exists()
        assert not folder.lock.exists()
        assert other.path.exists()
    os.close(lock)


def test_a_run_stays_alive_whatever_qemus_user_does_to_its_folder(small, runs, hypervisor):
    folder = RunFolder(hypervisor.scratch, "1" * 32)
    lock = folder.make(Owner(os.geteuid(), os.getegid()), small.uuid)
    (folder.path / "lock").touch()
    assert living_vms(hypervisor.scratch) == {small.uuid}
    with runs.take(runs.run(small)):
        assert folder.path.exists()
    os.close(lock)


def test_the_lock_of_an_older_versions_run_counts(small, hypervisor):
    folder = RunFolder(hypervisor.scratch, "2" * 32)
    lock = folder.make(Owner(os.geteuid(), os.getegid()), small.uuid)
    folder.lock.rename(folder.path / "lock")
    assert living_vms(hypervisor.scratch) == {small.uuid}
    os.close(lock)
    assert [one.run for one in dead_folders(hypervisor.scratch, small.uuid)] == [folder.run]


@pytest.mark.parametrize("lock", [None, ""], ids=["no lock", "a lock that names no VM"])
def test_a_folder_whose_run_was_killed_while_it_made_it_goes(lock, small, runs, hypervisor):
    folder = hypervisor.scratch / ("0" * 32)
    folder.mkdir(parents=True)
    if lock is not None:
        (folder / "lock").write_text(lock)
    with runs.take(runs.run(small)):
        assert not folder.exists()


def test_postbackup_where_prebackup_never_ran(lab, small, runs):
    off = lab.vm(start=False)
    for vm in (small, off):
        run = runs.run(vm)
        with runs.context(run) as ctx:
            runs.hypervisor.postbackup(run, Outcome(state=RunState.FAILED), ctx)
    gone = runs.run(off)
    off.domain.undefine()
    with runs.context(gone) as ctx:
        runs.hypervisor.postbackup(gone, Outcome(state=RunState.FAILED), ctx)


def test_the_job_is_not_aborted_while_somebody_is_connected(small, runs, monkeypatch, wait_for):
    monkeypatch.setattr(backup_job, "CLIENTS_LIMIT", 0.2)
    run = runs.run(small)
    with runs.context(run) as ctx:
        runs.hypervisor.prebackup(run, ctx)
        path = small.job_socket()
        wait_for(lambda: connected(path) == 0, "prebackup leaves no connection open")
        with socket.socket(socket.AF_UNIX) as half_open:
            half_open.connect(str(path))
            assert half_open.recv(8) == b"NBDMAGIC"
            assert connected(path) == 1
            with pytest.raises(HypervisorError, match=r"1 connection\(s\)") as refused:
                runs.hypervisor.postbackup(run, Outcome(state=RunState.FAILED), ctx)
            assert "End the process" in refused.value.hint
            assert small.job() != 0
        runs.hypervisor.postbackup(run, Outcome(state=RunState.FAILED), ctx)
    assert small.monitor("query-status")["running"]
    small.untouched()


class Occupied(Domain):
    """A VM that libvirt keeps to itself for a while once a job was told to end, as it does where AppArmor is on."""

    waits = 0

    def abort_job(self) -> None:
        super().abort_job()
        self.waits = 2

    def job_type(self) -> int:
        if self.waits:
            self.waits -= 1
            raise Busy("VM occupied: job: Timed out during operation: cannot acquire state change lock")
        return super().job_type()


def test_a_job_that_libvirt_takes_long_to_clear_away_has_ended(small, runs):
    run = runs.run(small)
    with runs.context(run) as ctx:
        runs.hypervisor.prebackup(run, ctx)
        domain = Occupied(small.domain)
        assert backup_job.end(domain, RunFolder(runs.hypervisor.scratch, run.id)) == ["ended a backup job"]
        assert (domain.waits, small.job()) == (0, 0)
        runs.hypervisor.postbackup(run, Outcome(state=RunState.FAILED), ctx)
    small.untouched()


@pytest.mark.parametrize("call", ["abort_job", "job_type", "delete_checkpoint"])
def test_a_guest_that_powers_off_at_the_moment_of_the_release_is_no_trouble(lab, runs, monkeypatch, call):
    vm = lab.vm(["qcow2:8"])
    with runs.take(runs.run(vm)) as first:
        pass
    with runs.take(runs.run(vm, first)) as old:
        pass
    real = getattr(Domain, call)

    def off(domain: Domain, *arguments: object, **more: object) -> object:
        vm.destroy()
        return real(domain, *arguments, **more)

    run = runs.run(vm, old, spent=(first.run.point,))
    with runs.take(run):
        monkeypatch.setattr(Domain, call, off)
    monkeypatch.undo()
    assert not vm.active
    assert vm.bitmaps() == {"vda": sorted(f"backupcore-{point}" for point in (old.run.point, run.point))}
    vm.start()
    with runs.take(runs.run(vm, old)) as again:
        assert not again.prepared.disks[0].whole


def test_a_disk_that_the_guest_has_given_back_does_not_keep_the_job(make_private, wait_for):
    """libvirt then waits for a job that it has not ended. (One of its own: 9.0 can crash when such a job ends.)"""
    vm, runs = make_private("scsi")
    with runs.take(runs.run(vm, tracked=False)):
        vm.monitor("device_del", id="ua-sdb")
        wait_for(lambda: vm.targets() == ["sda"], "libvirt hears of it")
        started = time.monotonic()
    assert time.monotonic() - started < patient(30)
    assert vm.job() == 0
    with runs.take(runs.run(vm, tracked=False)) as taken:
        assert [disk.id for disk in taken.prepared.disks] == ["sda"]
    vm.destroy()


class Deaf(Domain):
    """A VM whose backup job does not end, whatever libvirt is told; `answers` says whether its QEMU does."""

    answers = True

    def job_type(self) -> int:
        return 2

    def query(self, command: str, **arguments: object) -> object:
        if self.answers:
            return super().query(command, **arguments)
        raise Busy("VM deaf: QEMU's query-status: Timed out during operation")


@pytest.mark.parametrize("answers", [True, False])
def test_a_guest_that_may_go_on_is_not_to_be_destroyed(small, runs, monkeypatch, answers):
    monkeypatch.setattr(backup_job, "END_LIMIT", 0.2)
    run = runs.run(small)
    with runs.context(run) as ctx:
        runs.hypervisor.prebackup(run, ctx)
        domain = Deaf(small.domain)
        domain.answers = answers
        with pytest.raises(HypervisorError, match=r"has not ended .* QEMU (answers|does not answer)") as told:
            backup_job.end(domain, RunFolder(runs.hypervisor.scratch, run.id))
        assert f"vmkeep recover {small.name}" in told.value.hint
        assert ("virsh destroy" in told.value.hint) == (not answers)
        assert answers or "If it stands still for good, only" in told.value.hint
        monkeypatch.undo()
        runs.hypervisor.postbackup(run, Outcome(state=RunState.FAILED), ctx)
    small.untouched()


class NewLibvirt:
    """What `Domain` is given, of a libvirt of this version."""

    def __init__(self, version: int) -> None:
        self.version, self.flags = version, -1

    def name(self) -> str:
        return "new"

    UUIDString = name

    def connect(self) -> NewLibvirt:
        return self

    def getLibVersion(self) -> int:  # noqa: N802 - libvirt's name
        return self.version

    def backupBegin(self, _backup: str, _checkpoint: str | None, flags: int) -> None:  # noqa: N802 - as above
        self.flags = flags


@pytest.mark.parametrize(("version", "flags"), [(9_000_000, 1), (11_003_000, 1), (11_010_000, 3), (12_001_000, 3)])
def test_a_guest_that_shuts_down_stays_until_it_is_backed_up_where_libvirt_knows_how(version, flags):
    """Any other libvirt refuses a flag that it does not know."""
    found = NewLibvirt(version)
    Domain(found).begin_backup("<domainbackup/>", None)
    assert found.flags == flags


def test_a_strange_file_in_the_folder_of_a_run_stays(small, runs, caplog, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("x")
    run = runs.run(small)
    with runs.context(run) as ctx:
        runs.hypervisor.prebackup(run, ctx)
        (runs.hypervisor.scratch / run.id / "link.scratch").symlink_to(precious)
        (runs.hypervisor.scratch / run.id / "disk.qcow2").write_text("y")
        with caplog.at_level(logging.WARNING):
            runs.hypervisor.postbackup(run, Outcome(state=RunState.FAILED), ctx)
    assert "disk.qcow2" in caplog.text
    assert sorted(p.name for p in (runs.hypervisor.scratch / run.id).iterdir()) == ["disk.qcow2", "link.scratch"]
    assert precious.read_text() == "x"


def test_the_folder_of_a_run_is_closed_to_others(small, runs):
    with runs.take(runs.run(small)) as taken:
        folder = runs.hypervisor.scratch / taken.run.id
        found = folder.stat()
        assert (found.st_mode & 0o777, found.st_uid) == (0o700, small.folder.stat().st_uid)
        assert runs.hypervisor.scratch.stat().st_mode & 0o777 == 0o711


def test_the_run_is_given_up_before_scratch_is_full(lab, runs, tmpfs, wait_for):
    runs.hypervisor = Libvirt(runs.hypervisor.uri, tmpfs(40))  # before the VM: QEMU keeps the mounts of its start
    vm = lab.vm(["qcow2:64"])
    vm.io("vda", "write -P 0x11 0 60M")

    def fill() -> None:
        with runs.take(runs.run(vm)) as taken:
            for written in range(60):
                vm.io("vda", f"write -P 0x12 {written}M 1M")  # fails if QEMU cannot save what was there
                if taken.ctx.cancelled:
                    break
                # Of 40 MiB 4 stay free: near the end 1 MiB at a time, so that the watch looks between two of them.
                time.sleep(0.02 if written < 30 else 0.3)
            taken.ctx.check()

    with pytest.raises(TargetFull, match=r"scratch folder .* is full"):
        fill()
    assert vm.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
    vm.untouched()


def test_a_guest_that_was_stopped_by_full_scratch_goes_on(lab, runs, tmpfs, wait_for, tmp_path):
    scratch = tmpfs(3)  # before the VM: QEMU keeps the mounts of its start
    boot = tmp_path / "boot.raw"
    boot.write_bytes(boot_sector(30_000).ljust(15 * MiB, b"\x11"))
    vm = lab.vm(["qcow2:16"], content=boot)

    def writes() -> int:
        return int(vm.domain.blockStats("vda")[2])

    wait_for(lambda: writes() > 50, "the guest writes", 30)
    runs.hypervisor = Libvirt(runs.hypervisor.uri, scratch)

    def fill() -> None:
        with runs.take(runs.run(vm)) as taken:
            wait_for(lambda: taken.ctx.cancelled, "the run is given up", 60)
            wait_for(lambda: vm.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING, "the guest goes on")
            given_up = writes()
            wait_for(lambda: writes() > given_up + 50, "the guest writes, while the run does not end", 60)
            assert vm.job() == 0
            taken.ctx.check()

    with pytest.raises(TargetFull, match=r"scratch folder .* is full"):
        fill()
    assert vm.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
    before = writes()
    wait_for(lambda: writes() > before + 50, "the guest writes again", 60)
    vm.untouched()
    runs.hypervisor = Libvirt(runs.hypervisor.uri, Path(lab.folder / "scratch"))
    with runs.take(runs.run(vm)):
        wait_for(lambda: writes() > before + 100, "the guest writes during a backup", 60)
