"""The host is what it is said to be: without this, the other tests prove nothing of a real one."""

from __future__ import annotations

import pwd
from pathlib import Path

from lab.domain_xml import DiskSpec
from lab.fixtures import MakeVM


def test_qemu_runs_as_its_own_user_and_apparmor_confines_it(make_vm: MakeVM) -> None:
    assert "apparmor" in Path("/sys/kernel/security/lsm").read_text().split(",")
    vm = make_vm([DiskSpec(target="vda", size=8 << 20)])
    process = Path("/proc", Path(f"/run/libvirt/qemu/{vm.name}.pid").read_text())
    assert Path(process, "attr/current").read_text().strip() == f"libvirt-{vm.uuid} (enforce)"
    assert process.stat().st_uid == pwd.getpwnam("libvirt-qemu").pw_uid
    libvirtd = Path("/proc", Path("/run/libvirtd.pid").read_text().strip())
    assert Path(libvirtd, "attr/current").read_text().strip() == "libvirtd (enforce)"
