"""Restored definitions: what is carried over, and that a hostile one gives a guest nothing of the host."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import libvirt
import pytest

from backupcore.errors import ConfigError, IntegrityError, UnsupportedOperation
from backupcore_libvirt.definition import restored_definition
from lab import kernel

DISKS = {"vda": Path("/restored/a.qcow2")}


def restore(stored: str | bytes, *, disks=DISKS, nvram=None, name="again", no_ip=False, no_nic=False):
    data = stored if isinstance(stored, bytes) else stored.encode()
    made = restored_definition(data, name=name, disks=disks, nvram=nvram, no_ip=no_ip, no_nic=no_nic)
    return ElementTree.fromstring(made.xml)


def domain(devices: str = "", more: str = "", os: str = "", namespace: str = "") -> str:
    disk = (
        "<disk type='file' device='disk'><driver name='qemu' type='raw' cache='none' discard='unmap'/>"
        "<source file='/old/a.img'/><target dev='vda' bus='virtio'/></disk>"
    )
    return (
        f"<domain type='kvm' {namespace}><name>old</name><uuid>9fe0c1a6-0000-4000-8000-000000000001</uuid>"
        f"<memory unit='MiB'>64</memory><os><type arch='x86_64' machine='q35'>hvm</type>{os}</os>{more}"
        f"<devices>{disk}{devices}</devices></domain>"
    )


HOSTILE = domain(
    namespace="xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'",
    os="""<kernel>/etc/shadow</kernel><initrd>/etc/shadow</initrd><cmdline>/etc/shadow</cmdline><dtb>/etc/shadow</dtb>
        <loader readonly='yes' type='pflash'>/etc/shadow</loader><nvram template='/etc/shadow'>/etc/shadow</nvram>
        <acpi><table type='slic'>/etc/shadow</table></acpi>""",
    more="""<qemu:commandline><qemu:arg value='/etc/shadow'/><qemu:env name='A' value='/etc/shadow'/></qemu:commandline>
        <bootloader>/etc/shadow</bootloader><seclabel type='none'/>
        <resource><partition>/etc/shadow</partition></resource>
        <memoryBacking><source type='file'/></memoryBacking><genid>1</genid><on_crash>coredump-destroy</on_crash>
        <sysinfo type='fwcfg'><entry name='opt/x' file='/etc/shadow'/></sysinfo>
        <metadata><evil xmlns='urn:evil'>/etc/shadow</evil></metadata>""",
    devices="""<emulator>/etc/shadow</emulator>
        <disk type='file' device='disk'><source file='/etc/shadow'/><target dev='vdb' bus='virtio'/></disk>
        <disk type='file' device='cdrom'><source file='/etc/shadow'/><target dev='sda' bus='sata'/></disk>
        <hostdev mode='subsystem' type='pci'><source><address domain='0' bus='0' slot='0'/></source></hostdev>
        <filesystem type='mount'><source dir='/etc/shadow'/><target dir='x'/></filesystem>
        <serial type='file'><source path='/etc/shadow'/></serial>
        <serial type='pty'><source path='/etc/shadow'/><log file='/etc/shadow'/><target port='0'/></serial>
        <console type='unix'><source mode='bind' path='/etc/shadow'/></console>
        <channel type='unix'><source mode='connect' path='/etc/shadow'/>
          <target type='virtio' name='org.qemu.guest_agent.0'/></channel>
        <channel type='file'><source path='/etc/shadow'/><target type='virtio' name='x'/></channel>
        <interface type='ethernet'><script path='/etc/shadow'/></interface>
        <interface type='vhostuser'><source type='unix' path='/etc/shadow' mode='client'/></interface>
        <interface type='network'><source network='default'/><script path='/etc/shadow'/><backend tap='/etc/shadow'/>
          </interface>
        <rng model='virtio'><backend model='random'>/etc/shadow</backend></rng>
        <rng model='virtio'><backend model='egd' type='unix'><source path='/etc/shadow'/></backend></rng>
        <tpm model='tpm-tis'><backend type='passthrough'><device path='/etc/shadow'/></backend></tpm>
        <input type='passthrough' bus='virtio'><source evdev='/etc/shadow'/></input>
        <input type='evdev'><source dev='/etc/shadow'/></input>
        <graphics type='spice' passwd='x'><gl enable='yes' rendernode='/etc/shadow'/>
          <listen type='socket' socket='/etc/shadow'/></graphics>
        <audio id='1' type='file' path='/etc/shadow'/><shmem name='x'/><watchdog model='i6300esb' action='dump'/>
        <memory model='nvdimm'><source><path>/etc/shadow</path></source></memory>
        <smartcard mode='host-certificates'><database>/etc/shadow</database></smartcard>
        <redirdev bus='usb' type='dev'><source path='/etc/shadow'/></redirdev>
        <lease><lockspace>/etc/shadow</lockspace></lease><vsock model='virtio'><cid address='3'/></vsock>""",
)


def test_nothing_of_the_host_gets_through():
    result = restore(HOSTILE)
    text = ElementTree.tostring(result, encoding="unicode")
    assert "shadow" not in text
    assert [source.attrib for source in result.iter("source")] == [
        {"file": "/restored/a.qcow2"},
        {"network": "default"},
    ]
    assert [device.tag for device in result.find("devices")] == [
        "disk",
        "serial",
        "channel",
        "interface",
        "graphics",
    ]
    assert result.find("on_crash") is None
    assert result.find("os").attrib == {"firmware": "efi"}


def test_disks_name_and_identity_are_new():
    result = restore(domain())
    assert result.findtext("name") == "again"
    assert result.find("uuid") is None
    disk = result.find("devices/disk")
    assert disk.find("driver").attrib == {"name": "qemu", "type": "qcow2", "discard": "unmap"}
    assert disk.find("source").attrib == {"file": "/restored/a.qcow2"}


def test_the_name_by_which_a_guest_may_know_its_disk_is_kept():
    for name, kept in (("ua-data_1", True), ("virtio-disk0", False), ("ua-/etc/shadow", False)):
        named = domain().replace("bus='virtio'/>", f"bus='virtio'/><alias name='{name}'/>")
        assert (restore(named).find("devices/disk/alias") is not None) is kept


def test_a_disk_that_only_the_running_vm_had_gets_its_target(tmp_path):
    made = restore(domain(), disks={**DISKS, "vdc": tmp_path / "c"})
    first, second = made.findall("devices/disk")
    assert first.find("target").attrib == {"dev": "vda", "bus": "virtio"}
    assert second.find("target").attrib == {"dev": "vdc", "bus": "virtio"}
    assert second.find("source").attrib == {"file": str(tmp_path / "c")}


def test_nics_with_and_without_addresses():
    stored = domain(
        "<interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/><ip address='10.0.0.5'/>"
        "<filterref filter='clean'><parameter name='IP' value='10.0.0.5'/></filterref><model type='virtio'/>"
        "</interface>"
    )
    kept = ElementTree.tostring(restore(stored), encoding="unicode")
    assert "52:54:00:00:00:01" in kept
    assert kept.count("10.0.0.5") == 2
    without = restore(stored, no_ip=True)
    text = ElementTree.tostring(without, encoding="unicode")
    assert "52:54" not in text
    assert "10.0.0.5" not in text
    assert without.find("devices/interface/filterref").attrib == {"filter": "clean"}
    assert restore(stored, no_nic=True).find("devices/interface") is None


def test_settings_travel_with_the_vm():
    stored = domain(
        more="<metadata><b:backup xmlns:b='urn:backupcore:vm:1'><b:setting name='MODE'>FULL</b:setting></b:backup>"
        "<x:x xmlns:x='urn:x'/></metadata>"
    )
    metadata = restore(stored).find("metadata")
    assert [child.tag for child in metadata] == ["{urn:backupcore:vm:1}backup"]
    assert metadata[0][0].attrib == {"name": "MODE"}


def test_firmware():
    stored = "<loader readonly='yes' secure='no' type='pflash'>{}</loader><nvram template='/t'>/old/vars.fd</nvram>"
    known = restore(domain(os=stored.format("/usr/share/OVMF/OVMF_CODE_4M.fd")), nvram=Path("/restored/nvram"))
    assert known.findtext("os/loader") == "/usr/share/OVMF/OVMF_CODE_4M.fd"
    assert known.find("os/nvram").attrib == {}
    assert known.findtext("os/nvram") == "/restored/nvram"
    for path in ("/usr/share/OVMF/../../../etc/shadow", "/home/x/OVMF.fd"):
        other = restore(domain(os=stored.format(path)))
        assert (other.find("os/loader"), other.find("os/nvram")) == (None, None)
        assert other.find("os").get("firmware") == "efi"


@pytest.mark.parametrize(
    ("stored", "error", "match"),
    [
        (b"", IntegrityError, "cannot be used"),
        (b"\xff\xfe<", IntegrityError, "cannot be used"),
        (b"<!DOCTYPE d [<!ENTITY a 'b'>]><domain type='kvm'/>", IntegrityError, "cannot be used"),
        (b"<domain type='kvm'>" + b" " * (5 << 20) + b"</domain>", IntegrityError, "limit"),
        (b"<network/>", IntegrityError, "no domain definition"),
        (b"<domain type='kvm'><devices/></domain>", IntegrityError, "no <os>"),
        (b"<domain type='xen'/>", UnsupportedOperation, "xen"),
    ],
)
def test_what_is_no_definition(stored, error, match):
    with pytest.raises(error, match=match):
        restore(stored)


def test_a_name_that_no_vm_can_have():
    for name in ("", "a/b", "a\nb", "x" * 201):
        with pytest.raises(ConfigError):
            restore(domain(), name=name)


def test_a_restored_vm_can_be_defined_and_started(lab, hypervisor):
    vm = lab.vm(
        ["qcow2:8", "raw:8"],
        start=False,
        more="""<serial type='pty'><target port='0'/></serial><graphics type='vnc' port='5999' listen='127.0.0.1'/>
        <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
        <input type='tablet' bus='virtio'/><video><model type='vga'/></video><rng model='virtio'>
        <backend model='random'>/dev/urandom</backend></rng><interface type='user'><mac address='52:54:00:aa:bb:cc'/>
        </interface><controller type='scsi' model='virtio-scsi'/>""",
    )
    disks = {}
    for disk in vm.targets():
        disks[disk] = lab.folder / f"restored-{disk}.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disks[disk]), "8M"], check=True)
    name = f"{vm.name}-again"
    stored = vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE).encode()
    made = hypervisor.definition(stored, name=name, disks=disks, nvram=None, no_ip=True, no_nic=False)
    defined = vm.connection.defineXMLFlags(made.xml.decode(), libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
    lab.made.append(type(vm)(libvirt.open(hypervisor.uri), defined, lab.folder / "again"))
    defined.create()
    assert defined.UUIDString() != vm.uuid
    assert "52:54:00:aa:bb:cc" not in defined.XMLDesc()
    assert [disk.path for disk in hypervisor.find(name).disks] == [str(path) for path in disks.values()]


def test_the_nvram_of_a_uefi_vm_is_kept(lab, runs, hypervisor):
    vm = lab.vm(["qcow2:8"], firmware=kernel.firmware())
    nvram = Path(ElementTree.fromstring(vm.domain.XMLDesc()).findtext("os/nvram"))
    with runs.take(runs.run(vm)) as taken:
        artifact = next(a for a in taken.prepared.artifacts if a.name == "nvram")
        kept = artifact.open().read()
        assert len(kept) == nvram.stat().st_size
        assert kept[40:44] == b"_FVH", "the signature of a firmware volume"
    moved = nvram.with_name("away")
    shutil.move(nvram, moved)
    with runs.take(runs.run(vm)) as taken:  # it is told, and hinders nothing
        assert "nvram" not in {artifact.name for artifact in taken.prepared.artifacts}
    (left,) = taken.prepared.left_out
    assert (left.id, left.missed, str(nvram) in left.reason) == ("nvram", True, True)
    shutil.move(moved, nvram)
