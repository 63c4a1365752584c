"""What is refused, with its reason, and always before the guest is touched."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import libvirt
import pytest

from backupcore.errors import (
    AccessDenied,
    BackupError,
    Busy,
    HypervisorError,
    IncrementImpossible,
    NotFound,
    TargetFull,
    UnsupportedOperation,
)
from backupcore.model import VM, Outcome, RunState
from backupcore_libvirt import backup_job
from backupcore_libvirt.connection import Connection, Domain
from backupcore_libvirt.plugin import Libvirt
from backupcore_libvirt.versions import require

MiB = 1 << 20


@pytest.fixture
def refuse(runs):
    """Asserts that prebackup and estimate refuse a run with this error, and returns it."""

    def check(run, kind: type[BackupError], match: str, *, estimate: bool = True) -> BackupError:
        if estimate:
            with pytest.raises(kind, match=match):
                runs.hypervisor.estimate(run)
        with runs.context(run) as ctx:
            with pytest.raises(kind, match=match) as refused:
                runs.hypervisor.prebackup(run, ctx)
            runs.hypervisor.postbackup(run, Outcome(state=RunState.FAILED), ctx)
        assert not (runs.hypervisor.scratch / run.id).exists()
        assert type(refused.value) is kind
        return refused.value

    return check


def test_a_vm_that_is_unknown(small, runs, refuse):
    gone = replace(runs.run(small), vm=VM(uuid="00000000-0000-0000-0000-000000000001", name="gone"))
    refuse(gone, NotFound, "00000000-0000")


def test_qcow2_version_2(lab, runs, refuse):
    vm = lab.vm(["qcow2:8", "qcow2v2:8"])
    error = refuse(runs.run(vm), UnsupportedOperation, "disk vdb is qcow2 version 2")
    assert f"compat=1.1 {vm.disk('vdb')}" in error.hint
    vm.untouched()
    with runs.take(runs.run(vm, tracked=False)):
        pass


def test_snapshots_allow_no_increment_and_get_no_bitmap_beside_them(small, runs, refuse):
    with runs.take(runs.run(small)) as full:
        pass
    snapshot = small.domain.snapshotCreateXML("<domainsnapshot><name>before</name></domainsnapshot>", 0)
    try:
        refuse(runs.run(small, full), IncrementImpossible, r"has snapshots \(before\)")
        snapshot.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
        refuse(runs.run(small, full), IncrementImpossible, r"has snapshots \(before\)")  # one that only QEMU knows of
        with runs.take(runs.run(small, spent=(full.run.point,))):
            pass
        small.untouched()  # or QEMU would refuse to revert to the snapshot
    finally:
        small.monitor("human-monitor-command", **{"command-line": "delvm before"})


@pytest.mark.parametrize("how", ["NONE", "SUSPEND"])
def test_what_the_datastore_finds_out_meanwhile_is_told_before_the_guest_is_touched(small, runs, how):
    """A wrong password, say: no guest stands still for that."""
    run = runs.run(small, settings={"FS_FREEZE": how})

    def wrong() -> None:
        small.untouched()
        raise AccessDenied("wrong password")

    with runs.context(run) as ctx:
        ctx.on_touch(wrong)
        with pytest.raises(AccessDenied, match="wrong password"):
            runs.hypervisor.prebackup(run, ctx)
        assert not small.job()
        assert small.checkpoints() == set()
        runs.hypervisor.postbackup(run, Outcome(state=RunState.FAILED), ctx)
    small.untouched()


def test_a_job_of_somebody_else(small, runs, refuse, wait_for):
    folder = small.folder / "foreign"
    folder.mkdir()
    folder.chmod(0o777)
    small.domain.backupBegin(
        f"<domainbackup mode='pull'><server transport='unix' socket='{folder}/s'/>"
        f"<disks><disk name='vda' type='file'><scratch file='{folder}/a'/></disk></disks></domainbackup>",
        None,
        0,
    )
    try:
        refuse(runs.run(small), Busy, f"operation: backup, its socket is {folder}/s")
    finally:
        small.domain.abortJob()
        wait_for(lambda: not small.job(), "the end of the job")
    small.untouched()


def test_an_increment_whose_bitmaps_are_not_there(small, runs, refuse):
    with runs.take(runs.run(small)) as full:
        pass
    small.domain.checkpointLookupByName(f"backupcore-{full.run.point}").delete(0)
    missing = "the bitmap of the last backup is missing"
    refuse(runs.run(small, full), IncrementImpossible, f"disk vda: {missing}.*; disk vdb: {missing}")
    small.untouched()


def test_bitmaps_after_a_restart_and_after_a_crash_of_qemu(lab, runs, refuse):
    vm = lab.vm(["qcow2:8", "qcow2:8"])
    with runs.take(runs.run(vm)) as old:
        pass
    vm.destroy()
    vm.start()
    with runs.take(runs.run(vm, old)) as new:  # what was closed cleanly works
        pass
    vm.kill()
    for start in (lambda: None, vm.start):  # off, and running
        start()
        refuse(runs.run(vm, old), IncrementImpossible, "disk vda: .* is inconsistent; QEMU has probably crashed")
        refuse(runs.run(vm, new), IncrementImpossible, "disk vda: .* is missing: QEMU has crashed")
    with runs.take(runs.run(vm, spent=(old.run.point, new.run.point))) as full:
        pass
    assert vm.checkpoints() == {f"backupcore-{full.run.point}"}
    assert vm.bitmaps()["vdb"] == [f"backupcore-{full.run.point}"]


def test_another_image_under_the_same_target(lab, runs, refuse):
    vm = lab.vm(["qcow2:8"])
    with runs.take(runs.run(vm)) as full:
        pass
    vm.destroy()
    image = vm.disk("vda")
    other = image.with_name("other.qcow2")
    shutil.copy(image, other)  # with a bitmap that looks healthy
    vm.change((str(image), str(other)))
    vm.start()
    refuse(runs.run(vm, full), IncrementImpossible, f"disk vda: it is now {other}, at the last backup it was {image}")


def test_scratch_that_qemu_cannot_reach(needs_root, lab, small, runs, refuse):
    closed = lab.folder / "closed"
    closed.mkdir(mode=0o700)
    runs.hypervisor = Libvirt(runs.hypervisor.uri, closed / "scratch")
    error = refuse(runs.run(small), AccessDenied, f".* cannot pass {closed},")
    assert f"chmod o+x {closed}" in error.hint
    runs.hypervisor = Libvirt(runs.hypervisor.uri, lab.folder / ("long" * 12) / ("long" * 12))
    refuse(runs.run(small), HypervisorError, "107 is the limit")
    small.untouched()


def test_scratch_without_room(lab, small, runs, refuse, tmpfs):
    scratch = tmpfs(4)
    (scratch / "ballast").write_bytes(bytes(4 * MiB - 600_000))
    runs.hypervisor = Libvirt(runs.hypervisor.uri, scratch)
    refuse(runs.run(small), TargetFull, f"scratch folder {scratch}: 0 MiB are free")
    (scratch / "ballast").unlink()
    vm = lab.vm(["qcow2:8"], driver="error_policy='report'")
    error = refuse(runs.run(vm), TargetFull, r"lose writes to vda \(error_policy='report'\)")
    assert "error_policy" in error.hint
    vm.untouched()


def test_a_vm_without_disks(lab, runs, refuse):
    vm = lab.vm([], more="<disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>")
    refuse(runs.run(vm), UnsupportedOperation, r"has no disk that a backup could hold \(sda: a CD-ROM\)")


class StuckDomain(Domain):
    """A VM whose libvirtd was killed while a backup began: libvirt has a job that QEMU knows nothing of."""

    def __init__(self) -> None:
        self.name = "stuck"

    def is_active(self) -> bool:
        return True

    def job_type(self) -> int:
        raise HypervisorError("VM stuck: job: internal error: backup job data missing")


def test_a_job_that_libvirt_cannot_end_is_explained(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(backup_job, "BEGIN_LIMIT", 0.1)
    with pytest.raises(HypervisorError, match="holds a backup job that no longer exists") as refused:
        backup_job.left_behind(StuckDomain(), tmp_path)
    assert "/run/libvirt/qemu/stuck.xml" in refused.value.hint


class OldConnection(Connection):
    """A libvirt of another age, or one that does not offer backups."""

    def __init__(self, uri: str, version: tuple[int, int, int], offered: str) -> None:
        super().__init__(uri)
        self._version = version
        self._offered = offered

    def libvirt_version(self) -> tuple[int, int, int]:
        return self._version

    def domain_capabilities(self, *_: str) -> str:
        return f"<domainCapabilities><features><backup supported='{self._offered}'/></features></domainCapabilities>"


@pytest.mark.parametrize(
    ("version", "offered", "message"),
    [
        ((6, 0, 0), "yes", r"needs libvirt 7\.2\.0 and QEMU 5\.2\.0 at least; libvirt 6\.0\.0 and QEMU \d.* are here"),
        ((7, 4, 0), "no", r"does not offer backups with checkpoints; libvirt 7\.4\.0 and QEMU \d.* are here"),
    ],
)
def test_libvirt_that_is_too_old(libvirt_uri, small, version, offered, message):
    with OldConnection(libvirt_uri, version, offered) as connection:
        domain = connection.domain(small.uuid)
        with pytest.raises(UnsupportedOperation, match=message):
            require(connection, domain)


def test_a_daemon_that_is_away(tmp_path: Path):
    away = Libvirt(f"qemu+unix:///system?socket={tmp_path}/none", tmp_path)
    with pytest.raises(HypervisorError, match="does not answer") as refused:
        away.vms()
    assert "systemctl start libvirtd" in refused.value.hint
    findings = away.check()
    assert [(finding.subject, finding.ok) for finding in findings] == [("libvirt", False)]
    assert list(tmp_path.iterdir()) == []
