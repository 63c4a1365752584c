"""`vmkeep check` tries a backup on a VM made for it: what it says, and that it leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import libvirt

from backupcore_libvirt.place import confinement
from backupcore_libvirt.place import job_socket as place
from backupcore_libvirt.plugin import Libvirt

CHECK = """
import sys, pathlib
from backupcore_libvirt.plugin import Libvirt
from lab.kill_at import arm
arm("backupcore_libvirt.connection:Domain.begin_backup return")
Libvirt(sys.argv[1], pathlib.Path(sys.argv[2])).check()
"""


def trial_of(hypervisor, **how):
    return next((found for found in hypervisor.check(**how) if found.subject == "live backup"), None)


def traces() -> set[str]:
    logs = Path("/var/log/libvirt/qemu") if os.geteuid() == 0 else Path.home() / ".cache/libvirt/qemu/log"
    folders = Path("/var/lib/libvirt/qemu") if os.geteuid() == 0 else Path.home() / ".config/libvirt/qemu/lib"
    found = [*logs.glob("*vmkeep-check-*"), *folders.glob("domain-*-vmkeep-check-*")]
    with libvirt.open("qemu:///system" if os.geteuid() == 0 else "qemu:///session") as connection:
        names = [domain.name() for domain in connection.listAllDomains()]
    return {str(path) for path in found} | {name for name in names if name.startswith("vmkeep-check-")}


def test_a_backup_of_a_vm_made_for_it(hypervisor):
    before = traces()
    found = trial_of(hypervisor)
    assert found is not None
    assert found.ok, found
    assert f"a scratch file in {hypervisor.scratch}, QEMU's socket in the VM's own folder" in found.detail
    assert traces() <= before
    assert not hypervisor.scratch.exists()
    assert trial_of(hypervisor, try_vm=False) is None


def test_what_qemu_is_refused_is_named_with_its_remedy(needs_root, hypervisor, lab, monkeypatch):
    closed = lab.folder / "closed"
    closed.mkdir(mode=0o700)
    os.chown(closed, 0, 0)
    monkeypatch.setattr(place, "vm_folder", lambda _: closed)
    found = trial_of(hypervisor)
    assert found is not None
    assert not found.ok
    assert "Permission denied" in found.detail
    assert str(closed / "backupcore-") in found.detail
    assert "--no-vm" in found.hint
    assert not hypervisor.scratch.exists()


def test_a_check_that_is_killed_leaves_no_vm(hypervisor, small, runs, wait_for):
    before = traces()
    done = subprocess.run(
        [sys.executable, "-c", CHECK, hypervisor.uri, str(hypervisor.scratch)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    wait_for(lambda: not {trace for trace in traces() - before if not trace.endswith(".log")}, "libvirt ends it", 30)
    assert len([path for path in hypervisor.scratch.iterdir() if path.is_dir()]) == 1
    with runs.take(runs.run(small)):
        left = [path for path in hypervisor.scratch.iterdir() if path.is_dir()]
        assert len(left) == 1, "the run's own: it has cleared the other away"
    for trace in traces() - before:
        Path(trace).unlink()  # libvirt's log of it


def test_no_trial_where_something_is_wrong_already(needs_root, hypervisor, lab):
    closed = lab.folder / "closed"
    closed.mkdir(mode=0o700)
    assert trial_of(Libvirt(hypervisor.uri, closed / "scratch")) is None


def test_remedies(tmp_path, monkeypatch):
    scratch = Path("/srv/scratch")
    rules = tmp_path / "apparmor.d"
    monkeypatch.setattr(confinement, "_APPARMOR", rules)
    told = confinement.remedy(["apparmor"], scratch)
    assert "'/srv/scratch/** rwk,'" in told
    assert f"{rules}/local/abstractions/libvirt-qemu, then restart the VM" in told
    (rules / "abstractions/libvirt-qemu.d").mkdir(parents=True)
    assert f"{rules}/abstractions/libvirt-qemu.d/vmkeep, " in confinement.remedy(["apparmor"], scratch)
    assert "semanage fcontext" in confinement.remedy(["selinux"], scratch)
    mode = tmp_path / "enforce"
    monkeypatch.setattr(confinement, "_SELINUX", mode)
    assert confinement.described(["selinux"]) == "SELinux, permissive"
    mode.write_text("1")
    assert confinement.described(["selinux"]) == "SELinux, enforcing"
    assert confinement.described(["apparmor"]) == "AppArmor"
    assert confinement.described([]) == "no confinement"
