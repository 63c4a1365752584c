"""What host tooling asks: VMs, settings, estimates, checks."""

from __future__ import annotations

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import backupcore_libvirt
import libvirt
import pytest

from backupcore.errors import ConfigError, NotFound
from backupcore.model import VM

MiB = 1 << 20


def test_vms_and_find(lab, small, hypervisor):
    off = lab.vm(["qcow2:8M"], start=False)
    states = {state.vm.uuid: state for state in hypervisor.vms()}
    assert states[off.vm.uuid].state == "off"
    assert states[small.vm.uuid].state == "running"
    assert [state.vm.name for state in hypervisor.vms()] == sorted(state.vm.name for state in hypervisor.vms())
    assert [(d.id, d.format, d.virtual_size) for d in states[small.vm.uuid].disks] == [
        ("vda", "qcow2", 16 * MiB),
        ("vdb", "qcow2", 8 * MiB),
    ]
    assert hypervisor.find(small.vm.name) == hypervisor.find(small.vm.uuid) == states[small.vm.uuid]
    with pytest.raises(NotFound, match="no VM") as missing:
        hypervisor.find(small.vm.name[:-1])
    assert small.vm.name in missing.value.hint


def test_settings_of_running_and_stopped_vms_last(lab, small, hypervisor):
    vm = small
    assert hypervisor.settings(vm.vm) == {}
    hypervisor.configure(vm.vm, {"MODE": "FULL", "KEEP_LAST": "3 & <4>"})
    assert hypervisor.settings(vm.vm) == {"MODE": "FULL", "KEEP_LAST": "3 & <4>"}
    for flags in (0, libvirt.VIR_DOMAIN_XML_INACTIVE):
        assert "urn:backupcore:vm:1" in vm.domain.XMLDesc(flags), "in the running and in the stored definition"
    off = lab.vm(["qcow2:8M"], start=False)
    hypervisor.configure(off.vm, {"MODE": "INCREMENT"})
    assert hypervisor.settings(off.vm) == {"MODE": "INCREMENT"}
    for wrong in ({"mode": "x"}, {"MODE": "a\nb"}):
        with pytest.raises(ConfigError):
            hypervisor.configure(vm.vm, wrong)
    with pytest.raises(NotFound):
        hypervisor.settings(VM(uuid="00000000-0000-0000-0000-000000000001", name="gone"))


def test_estimates_touch_nothing(small, runs, hypervisor):
    small.io("vda", "write -P 0x11 0 4M")
    full = hypervisor.estimate(runs.run(small))
    small.untouched()
    assert not hypervisor.scratch.exists()
    assert {disk.id: disk.whole for disk in full.disks} == {"vda": True, "vdb": True}
    assert 4 * MiB <= full.disks[0].bytes < 6 * MiB
    with runs.take(runs.run(small)) as taken:
        pass
    small.io("vda", "write -P 0x12 1M 128k")
    increment = hypervisor.estimate(runs.run(small, taken))
    assert {disk.id: (disk.bytes, disk.whole) for disk in increment.disks} == {
        "vda": (131072, False),
        "vdb": (0, False),
    }


def test_check(hypervisor, lab):
    findings = {finding.subject: finding for finding in hypervisor.check()}
    assert all(finding.ok for finding in findings.values()), findings
    assert {"libvirt", "QEMU", "QEMU's user", "scratch folder"} <= set(findings)
    lab.folder.chmod(0o700)
    closed = {finding.subject: finding for finding in hypervisor.check()}["scratch folder"]
    assert not closed.ok
    assert str(lab.folder) in closed.detail
    assert "chmod" in closed.hint


def test_the_entry_point_leads_to_the_plugin(tmp_path):
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    value = project["entry-points"]["backupcore.hypervisors"]["libvirt"]
    plugin = EntryPoint("libvirt", value, "backupcore.hypervisors").load()
    assert plugin(uri="qemu:///session", scratch=tmp_path).uri == "qemu:///session"
    assert project["version"] == backupcore_libvirt.__version__
