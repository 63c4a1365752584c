"""docs/restored-definition.md lists what a restored definition loses: all of it, and nothing else."""

from __future__ import annotations

from pathlib import Path

import libvirt
import pytest

from backupcore.hypervisor import EFFECTS
from backupcore_libvirt.definition import restored_definition
from backupcore_libvirt.left_out import SECTIONS, effect_of, page, plain
from backupcore_libvirt.redacted import redacted

PAGE = Path(__file__).parents[3] / "docs" / "restored-definition.md"

EVERYTHING = """<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
<name>old</name><uuid>9fe0c1a6-0000-4000-8000-000000000001</uuid><genid>9fe0c1a6-0000-4000-8000-000000000002</genid>
<title>t</title><description>d</description><metadata><evil xmlns='urn:evil'/>
  <b:backup xmlns:b='urn:backupcore:vm:1'><b:setting name='MODE'>FULL</b:setting></b:backup></metadata>
<memory unit='MiB'>64</memory><vcpu placement='static' cpuset='0-1'>2</vcpu><iothreads>1</iothreads>
<bootloader>/b</bootloader>
<cputune/><numatune/><memoryBacking/><resource/><seclabel type='none'/><on_crash>coredump-destroy</on_crash>
<sysinfo type='fwcfg'/><qemu:commandline/>
<os><type arch='x86_64' machine='q35'>hvm</type><loader type='rom'>/l</loader><nvram>/n</nvram><kernel>/k</kernel>
  <initrd>/i</initrd><cmdline>c</cmdline><dtb>/d</dtb><acpi/><smbios mode='sysinfo'/></os>
<devices><emulator>/e</emulator>
<disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none' io='native' iothread='1'/>
  <source file='/a'/><target dev='vda' bus='virtio'/><backingStore/><encryption/><auth/><readonly/>
  <shareable/><transient/><iotune/><alias name='ua-a'/></disk>
<disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>
<interface type='network' managed='no'><mac address='52:54:00:00:00:01'/><source network='default'/>
  <target dev='vnet0'/><alias name='ua-n'/><script path='/s'/><backend tap='/t'/><ip address='10.0.0.5'/>
  <route address='0.0.0.0'/>
  <filterref filter='clean'><parameter name='IP' value='10.0.0.5'/></filterref></interface>
<interface type='ethernet'/>
<serial type='pty'><source path='/dev/pts/1'/><log file='/l'/><target port='0'/><address type='isa'/></serial>
<serial type='file'/><console type='unix'/><channel type='file'/><redirdev bus='usb' type='dev'/>
<channel type='unix'><source path='/s'/><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
<graphics type='vnc' port='5900' listen='0.0.0.0' passwd='x'><listen type='address'/><gl/></graphics>
<rng model='virtio'><backend model='egd'/></rng>
<rng model='virtio'><backend model='random' type='x'>/dev/random</backend></rng>
<tpm model='tpm-tis'/><tpm><backend type='emulator'><encryption secret='s'/></backend></tpm>
<input type='evdev'/><audio id='1' type='file'/><watchdog model='x' action='dump'/>
<hostdev/><filesystem/><shmem/><lease/><smartcard/><memory/><vsock/>
</devices></domain>"""


def made(stored: str = EVERYTHING, **more):
    asked = {
        "name": "again",
        "disks": {"vda": Path("/r/a"), "vdz": Path("/r/z")},
        "nvram": None,
        "no_ip": True,
        "no_nic": False,
    }
    return restored_definition(stored.encode(), **{**asked, **more})


def test_the_page_is_made_of_the_table():
    assert PAGE.read_text() == page(), "python -m backupcore_libvirt.left_out > docs/restored-definition.md"


def test_the_table_lists_exactly_what_is_left_out():
    # Left out as a whole where its kind is not listed, and as an attribute of one that is.
    listed = [path for section in SECTIONS for row in section.rows for path in row.paths]
    assert len(listed) == len(set(listed))
    assert {plain(path) for path in made(redact=True).left_out} == set(listed)


def test_what_is_left_out_is_sorted_by_what_it_does_to_the_guest():
    found = made()
    assert list(found.effects) == list(EFFECTS)
    assert found.left_out == tuple(path for paths in found.effects.values() for path in paths)
    boot, device, cosmetic = found.effects.values()
    assert {"os/kernel", "os/loader", "bootloader"} <= set(boot)
    assert "devices/tpm/backend/encryption" in device
    assert {"devices/disk[sda]", "devices/hostdev", "devices/interface/mac"} <= set(device)
    assert {"uuid", "devices/interface/alias", "seclabel"} <= set(cosmetic)


@pytest.mark.parametrize(
    ("path", "effect"),
    [
        ("os/shim", "will not boot"),
        ("launchSecurity", "will not boot"),
        ("devices/crypto (2 times)", "loses a device"),
        ("features/hyperv/xmm_input", "loses a device"),
        ("cpu/@x", "loses a device"),
        ("devices/crypto/@model", "cosmetic"),
        ("metadata/{urn:x}y", "cosmetic"),
        ("{urn:x}y", "loses a device"),
    ],
)
def test_what_the_table_does_not_know(path, effect):
    assert effect_of(path) == effect


SECRET = """<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
<name>old</name><title>hunter2</title><description>root: hunter2</description>
<metadata><x:x xmlns:x='urn:x'>hunter2</x:x>
  <b:backup xmlns:b='urn:backupcore:vm:1'><b:setting name='MODE'>FULL</b:setting></b:backup></metadata>
<memory unit='MiB'>64</memory><os><type arch='x86_64' machine='q35'>hvm</type><cmdline>ro</cmdline>
<smbios mode='sysinfo'/></os>
<sysinfo type='smbios'><oemStrings><entry>io.systemd.credential:x=hunter2</entry></oemStrings></sysinfo>
<devices/><qemu:commandline><qemu:arg value='-x'/><qemu:env name='TOKEN' value='hunter2'/></qemu:commandline>
</domain>"""


def test_a_redacted_definition_holds_no_text_of_people():
    stored = redacted(SECRET)
    assert "hunter2" not in stored
    for piece in (">old<", ">ro<", "FULL", 'name="TOKEN"', "(redacted)"):
        assert piece in stored
    assert made(stored).xml == made(redacted(stored)).xml, "twice is once"
    open_one, closed = made(SECRET), made(SECRET, redact=True)
    assert b"hunter2" in open_one.xml
    assert b"hunter2" not in closed.xml
    gone = {"title", "description", "sysinfo", "os/smbios"}
    assert set(closed.left_out) - set(open_one.left_out) == gone
    assert gone <= set(closed.effects["cosmetic"])
    assert b"MODE" in closed.xml


def test_a_vm_starts_whose_strings_of_smbios_are_left_out(lab):
    vm = lab.vm(["qcow2:1"], start=False)
    strings = "<sysinfo type='smbios'><system><entry name='serial'>hunter2</entry></system></sysinfo>"
    vm.change(("<os>", f"{strings}<os>"), ("</os>", "<smbios mode='sysinfo'/></os>"))
    stored = vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    restored = made(stored, name=f"{vm.name}-again", disks={"vda": vm.disk("vda")}, redact=True).xml.decode()
    assert "hunter2" not in restored
    again = vm.connection.createXML(restored, libvirt.VIR_DOMAIN_START_PAUSED | libvirt.VIR_DOMAIN_START_AUTODESTROY)
    again.destroy()


def test_a_backup_stores_what_its_settings_say(lab, runs):
    vm = lab.vm(["raw:1"], start=False)
    vm.change(("<devices>", "<description>hunter2</description><devices>"))
    for settings, kept in (({}, True), ({"REDACT": "YES"}, False)):
        with runs.take(runs.run(vm, settings=settings)) as taken:
            (stored,) = (artifact.data for artifact in taken.prepared.artifacts if artifact.name == "vm.xml")
        assert (b"hunter2" in stored) is kept
        assert made(stored.decode(), disks={"vda": Path("/r/a")}).left_out is not None


def test_what_is_taken_over_is_not_named_as_left_out():
    stored = (
        "<domain type='kvm'><name>old</name><memory unit='MiB'>64</memory><vcpu>1</vcpu><cpu mode='host-passthrough'/>"
        "<os firmware='efi'><type arch='x86_64' machine='q35'>hvm</type><boot dev='hd'/></os>"
        "<features><acpi/></features>"
        "<devices><disk type='file' device='disk' model='virtio-transitional'>"
        "<driver name='qemu' type='raw' discard='unmap' queues='2'/><source file='/a'/>"
        "<target dev='vda' bus='virtio' removable='on' rotation_rate='7200'/><geometry cyls='2' heads='16' secs='63'/>"
        "<blockio logical_block_size='4096' physical_block_size='4096' discard_granularity='65536'/>"
        "<serial>S1</serial><wwn>5000c50015ea71aa</wwn><vendor>V1</vendor><product>P1</product>"
        "<address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/></disk>"
        "<interface type='network'><mac address='52:54:00:00:00:01'/><source network='default'/></interface>"
        "<graphics type='vnc' autoport='yes'/></devices></domain>"
    )
    more = {"name": "again", "disks": {"vda": Path("/r/a")}, "nvram": None, "no_ip": False}
    whole = restored_definition(stored.encode(), no_nic=False, **more)
    assert (whole.left_out, whole.nvram_format) == ((), "raw")
    for piece in (
        *("4096", "65536", "transitional", "queues", "removable", "rotation_rate", "cyls"),
        *("S1", "5000c50015ea71aa", "V1", "P1"),
    ):
        assert piece in whole.xml.decode()
    assert restored_definition(stored.encode(), no_nic=True, **more).left_out == ("devices/interface",)
    without = restored_definition(stored.encode(), no_nic=False, new_mac=True, **more)
    assert without.left_out == ("devices/interface/mac",)
    assert b"52:54" not in without.xml


def test_a_uuid_is_kept_where_asked_for():
    more = {"name": "again", "disks": {"vda": Path("/r/a")}, "nvram": None, "no_ip": False, "no_nic": False}
    kept = restored_definition(EVERYTHING.encode(), keep_uuid=True, **more)
    assert b"<uuid>9fe0c1a6-0000-4000-8000-000000000001</uuid>" in kept.xml
    assert "uuid" not in kept.left_out


@pytest.mark.parametrize(
    ("loader", "nvram", "expected"),
    [
        ("format='qcow2'>/usr/share/edk2/ovmf/CODE.qcow2", "", "qcow2"),
        ("format='qcow2'>/usr/share/edk2/ovmf/CODE.qcow2", "format='qcow2'", "qcow2"),
        (">/usr/share/OVMF/CODE.fd", "", "raw"),
        (">/mine/CODE.fd", "format='qcow2'", "qcow2"),
    ],
)
def test_firmware_variables_keep_their_format(loader, nvram, expected):
    stored = (
        "<domain type='kvm'><name>old</name><memory unit='MiB'>64</memory>"
        "<os><type arch='x86_64' machine='q35'>hvm</type>"
        f"<loader readonly='yes' type='pflash' {loader}</loader><nvram {nvram}>/n</nvram></os></domain>"
    )
    more = {"name": "again", "disks": {}, "nvram": Path("/r/n"), "no_ip": False, "no_nic": False}
    found = restored_definition(stored.encode(), **more)
    assert found.nvram_format == expected
    assert (b'<nvram format="qcow2">/r/n' in found.xml) is (expected == "qcow2")
    assert (b'format="qcow2">/usr/share' in found.xml) is ("format" in loader)
