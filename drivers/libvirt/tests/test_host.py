"""What host tooling asks: VMs, settings, estimates, checks."""

from __future__ import annotations

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import libvirt
import pytest

import backupcore_libvirt
from backupcore.errors import ConfigError, HypervisorError, NotFound
from backupcore.model import VM
from backupcore_libvirt.connection import Domain
from backupcore_libvirt.overlay import left
from backupcore_libvirt.plugin import Libvirt

MiB = 1 << 20


def test_vms_and_find(lab, small, hypervisor):
    off = lab.vm(["qcow2:8"], start=False)
    states = {state.vm.uuid: state for state in hypervisor.vms()}
    assert states[off.uuid].state == "off"
    assert states[small.uuid].state == "running"
    names = [state.vm.name for state in states.values()]  # of one look: other tests' VMs come and go
    assert names == sorted(names)
    assert [(d.id, d.format, d.virtual_size) for d in states[small.uuid].disks] == [
        ("vda", "qcow2", 16 * MiB),
        ("vdb", "qcow2", 8 * MiB),
    ]
    assert hypervisor.find(small.name) == hypervisor.find(small.uuid) == states[small.uuid]
    with pytest.raises(NotFound, match="no VM") as missing:
        hypervisor.find(small.name[:-1])
    assert small.name in missing.value.hint
    off.domain.rename(small.uuid)
    with pytest.raises(ConfigError, match="the name of one VM and the UUID of another"):
        hypervisor.find(small.uuid)
    assert hypervisor.find(off.uuid).vm.uuid == off.uuid


def test_a_listing_asks_no_running_qemu_for_its_block_nodes(lab, small, hypervisor, monkeypatch):
    vm = lab.vm(["raw:8", "qcow2v2:8"])
    for disk in ("vda", "vdb"):
        vm.domain.blockResize(disk, 9 * MiB + 512, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    with monkeypatch.context() as patched:
        patched.delattr(Domain, "block_sizes")
        patched.delattr(Domain, "query")
        seen = [hypervisor.find(found.name).disks for found in (vm, small)]
    assert [disk.virtual_size for disk in seen[0]] == [9 * MiB + 512] * 2
    assert [disk.virtual_size for disk in seen[1]] == [16 * MiB, 8 * MiB]


def test_a_listing_in_the_moment_in_which_a_merge_ends_shows_no_header_that_cannot_be_read(
    small, hypervisor, monkeypatch
):
    """An overlay that was there a moment ago is gone, or its header half changed."""
    real, found = left.remarks, []

    def moving(*arguments: object) -> list[str]:
        found.append(arguments)
        if len(found) == 1:
            raise HypervisorError("read the header of /overlay: No such file or directory")
        return real(*arguments)

    monkeypatch.setattr(left, "remarks", moving)
    assert (hypervisor.find(small.name).remarks, len(found)) == ((), 2)


def test_settings_of_running_and_stopped_vms_last(lab, small, hypervisor):
    vm = small
    assert hypervisor.settings(vm.identity) == {}
    hypervisor.configure(vm.identity, {"MODE": "FULL", "KEEP_LAST": "3 & <4>"})
    assert hypervisor.settings(vm.identity) == {"MODE": "FULL", "KEEP_LAST": "3 & <4>"}
    for flags in (0, libvirt.VIR_DOMAIN_XML_INACTIVE):
        assert "urn:backupcore:vm:1" in vm.domain.XMLDesc(flags), "in the running and in the stored definition"
    off = lab.vm(["qcow2:8"], start=False)
    hypervisor.configure(off.identity, {"MODE": "INCREMENT"})
    assert hypervisor.settings(off.identity) == {"MODE": "INCREMENT"}
    for wrong in ({"mode": "x"}, {"MODE": "a\nb"}):
        with pytest.raises(ConfigError):
            hypervisor.configure(vm.identity, wrong)
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
    assert {"libvirt", "QEMU", "QEMU's programs", "QEMU's user", "scratch folder"} <= set(findings)


def test_check_names_a_scratch_folder_that_qemu_cannot_reach(needs_root, hypervisor, lab):
    closed = lab.folder / "closed"
    closed.mkdir(mode=0o700)
    findings = Libvirt(hypervisor.uri, closed / "scratch").check()
    finding = next(finding for finding in findings if finding.subject == "scratch folder")
    assert not finding.ok
    assert str(closed) in finding.detail
    assert "chmod" in finding.hint


def test_the_entry_point_leads_to_the_plugin(tmp_path):
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    value = project["entry-points"]["backupcore.hypervisors"]["libvirt"]
    plugin = EntryPoint("libvirt", value, "backupcore.hypervisors").load()
    assert plugin(uri="qemu:///session", scratch=tmp_path).uri == "qemu:///session"
    assert project["version"] == backupcore_libvirt.__version__
