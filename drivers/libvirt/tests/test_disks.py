"""Which disks of a definition a backup holds, and all the kinds of disks that it does hold."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from backupcore.errors import HypervisorError, UnsupportedOperation
from backupcore_libvirt.connection import Connection, Domain
from backupcore_libvirt.disks import BY_RULE, DiskChoice, located, source_disks

MiB = 1 << 20


def parsed(inner: str, *, kind: str = "file", device: str = "disk", choice: DiskChoice = BY_RULE):
    disk = f"<disk type='{kind}' device='{device}'>{inner}<target dev='vda' bus='virtio'/></disk>"
    (found,) = source_disks(f"<domain><devices>{disk}</devices></domain>", choice)
    return found


FILE = "<driver name='qemu' type='qcow2'/><source file='/a'/>"


@pytest.mark.parametrize(
    ("inner", "kind", "device", "reason"),
    [
        (FILE, "file", "cdrom", "a CD-ROM"),
        (FILE, "file", "floppy", "a floppy"),
        ("<source dev='/dev/sda'/>", "block", "lun", "a SCSI device passed through (lun)"),
        ("", "file", "disk", "empty"),
        (FILE + "<readonly/>", "file", "disk", "read-only"),
        (FILE + "<shareable/>", "file", "disk", "shareable: others write to it"),
        (FILE + "<transient/>", "file", "disk", "transient: what the guest writes"),
        ("<source protocol='rbd' name='pool/a'/>", "network", "disk", "a network disk (rbd)"),
        ("<source type='pci'/>", "nvme", "disk", "a nvme disk"),
        ("<driver type='vmdk'/><source file='/a'/>", "file", "disk", "format vmdk"),
    ],
)
def test_what_is_left_out(inner, kind, device, reason):
    assert parsed(inner, kind=kind, device=device).left_out.startswith(reason)


@pytest.mark.parametrize(
    ("inner", "kind", "path", "form"),
    [
        (FILE, "file", "/a", "qcow2"),
        ("<source file='/a'/>", "file", "/a", "raw"),
        ("<driver type='raw'/><source dev='/dev/vg/a'/>", "block", "/dev/vg/a", "raw"),
        ("<driver type='qcow2'/><source pool='p' volume='v'/>", "volume", "p/v", "qcow2"),
    ],
)
def test_what_is_held(inner, kind, path, form):
    disk = parsed(inner, kind=kind)
    assert (disk.id, disk.path, disk.format, disk.left_out, disk.encrypted) == ("vda", path, form, "", False)


def test_encryption_is_seen_wherever_it_stands():
    luks = "<encryption format='luks'><secret type='passphrase' uuid='x'/></encryption>"
    assert parsed(f"<source file='/a'>{luks}</source>").encrypted
    assert parsed(f"<source file='/a'/>{luks}").encrypted


RUNNING = FILE.replace("/a'", "/a' index='2'")


@pytest.mark.parametrize(
    ("inner", "settings", "reason"),
    [
        (FILE, {"EXCLUDE_DISKS": "vdb,vda"}, "excluded (EXCLUDE_DISKS)"),
        (FILE, {"EXCLUDE_DISKS": "vdb"}, ""),
        (FILE, {"VOLATILE_DISKS": "vda"}, "volatile (VOLATILE_DISKS, BACKUP_VOLATILE=NO)"),
        (FILE, {"VOLATILE_DISKS": "vda", "BACKUP_VOLATILE": "YES"}, ""),
        (FILE + "<transient/>", {"BACKUP_VOLATILE": "YES"}, ""),
        (
            RUNNING + "<transient/>",
            {"BACKUP_VOLATILE": "YES"},
            "transient: libvirt makes no backup of such a disk while the VM runs",
        ),
        (FILE + "<readonly/>", {"VOLATILE_DISKS": "vda", "BACKUP_VOLATILE": "YES"}, "read-only"),
    ],
)
def test_what_the_settings_choose(inner, settings, reason):
    assert parsed(inner, choice=DiskChoice.of(settings)).left_out == reason


def test_settings_that_choose_disks_of_a_vm(lab, runs, hypervisor, caplog):
    image = lab.folder / "transient.qcow2"
    create(image)
    transient = disk_xml("vdx", f"<source file='{image}'/>").replace("</disk>", "<transient/></disk>")
    vm = lab.vm(["qcow2:8", "qcow2:8", "qcow2:8"], more=transient)
    settings = {"EXCLUDE_DISKS": "vdb,vdz", "VOLATILE_DISKS": "vdc"}
    reasons = {
        "vdb": "excluded (EXCLUDE_DISKS)",
        "vdc": "volatile (VOLATILE_DISKS, BACKUP_VOLATILE=NO)",
        "vdx": "transient: what the guest writes to it is thrown away at power-off (BACKUP_VOLATILE=NO)",
    }
    run = runs.run(vm, settings=settings)
    assert {left.id: left.reason for left in hypervisor.estimate(run).left_out} == reasons
    with caplog.at_level(logging.WARNING), runs.take(run) as taken:
        assert [disk.id for disk in taken.prepared.disks] == ["vda"]
        assert {left.id: left.reason for left in taken.prepared.left_out} == reasons
    assert f"VM {vm.name} has no disk vdz, which its setting EXCLUDE_DISKS names" in caplog.text
    assert vm.bitmaps()["vdb"] == []
    with runs.take(runs.run(vm, settings=settings | {"BACKUP_VOLATILE": "YES"})) as taken:
        assert [disk.id for disk in taken.prepared.disks] == ["vda", "vdc"]
        left = {left.id: left.reason for left in taken.prepared.left_out}
        assert left["vdx"] == "transient: libvirt makes no backup of such a disk while the VM runs"
    hypervisor.configure(vm.identity, {"EXCLUDE_DISKS": "vdb"})
    shown = {disk.id: disk.left_out for disk in hypervisor.find(vm.name, {"VOLATILE_DISKS": "vdc"}).disks}
    assert shown == {"vda": ""} | reasons
    with pytest.raises(UnsupportedOperation, match="vda: excluded"):
        hypervisor.estimate(runs.run(vm, settings={"EXCLUDE_DISKS": "vda,vdb,vdc,vdx"}))


class Pools(Domain):
    """A VM and the volumes of this host's storage pools."""

    def __init__(self) -> None:
        self.name = "web"

    def volume(self, pool: str, volume: str):
        if pool == "gone":
            raise HypervisorError(f"Storage pool not found: {pool}")
        return f"/{pool}/{volume}", pool


@pytest.mark.parametrize(
    ("pool", "found"),
    [
        ("file", ("file", "/file/v", "")),
        ("block", ("block", "/block/v", "")),
        ("network", ("network", "/network/v", "a volume on the network; file and block disks are supported")),
        ("gone", ("volume", "gone/v", "")),
    ],
)
def test_where_volumes_lie(pool, found):
    disk = located(Pools(), parsed(f"<source pool='{pool}' volume='v'/>", kind="volume"))
    assert (disk.kind, disk.path, disk.left_out) == found


def create(path: Path, *options: str, size: str = "8M", form: str = "qcow2") -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", form, *options, path, size], check=True)
    return path


def disk_xml(target: str, source: str, *, kind: str = "file", form: str = "qcow2", bus: str = "virtio") -> str:
    return (
        f"<disk type='{kind}' device='disk'><driver name='qemu' type='{form}'/>{source}"
        f"<target dev='{target}' bus='{bus}'/><alias name='ua-{target}'/></disk>"
    )


@pytest.fixture
def pool(lab, vm_prefix, libvirt_uri) -> Iterator[str]:
    """A storage pool with a volume "data" (qcow2, which libvirt makes as version 2 unless asked) of 8 MiB."""
    connection = libvirt.open(libvirt_uri)
    folder = lab.folder / "pool"
    folder.mkdir()
    name = f"{vm_prefix}pool"
    made = connection.storagePoolCreateXML(
        f"<pool type='dir'><name>{name}</name><target><path>{folder}</path></target></pool>"
    )
    made.createXML(
        "<volume><name>data</name><capacity unit='MiB'>8</capacity>"
        "<target><format type='qcow2'/><compat>1.1</compat></target></volume>"
    )
    yield name
    made.destroy()
    connection.close()


def test_volumes_devices_backing_chains_and_buses(lab, runs, pool, loop, restored, tmp_path):
    """A full and two increments of each, one with the VM off; a pattern is where it was written, zeros elsewhere."""
    create(loop, size="4M")
    base = create(lab.folder / "base.qcow2")
    subprocess.run(["qemu-io", "-c", "write -P 0x10 0 1M", base], check=True, capture_output=True)
    overlay = create(lab.folder / "overlay.qcow2", "-F", "qcow2", "-b", str(base))
    vm = lab.vm(
        ["qcow2:8"],
        more="".join(
            [
                disk_xml("vdb", f"<source pool='{pool}' volume='data'/>", kind="volume"),
                disk_xml("vdc", f"<source dev='{loop}'/>", kind="block"),
                disk_xml("vdd", f"<source file='{overlay}'/>"),
                disk_xml("sda", f"<source file='{create(lab.folder / 'sda.qcow2')}'/>", bus="scsi"),
                disk_xml("sdb", f"<source file='{create(lab.folder / 'sdb.qcow2')}'/>", bus="sata"),
            ]
        ),
    )
    disks = ["vda", "vdb", "vdc", "vdd", "sda", "sdb"]
    layers, parent = [], None
    for number in (1, 2):
        for place, disk in enumerate(disks):
            vm.io(disk, f"write -P {16 * number + place} {number}M 64k")
        with runs.take(runs.run(vm, parent)) as parent:
            assert [(disk.id, disk.whole) for disk in parent.prepared.disks] == [(disk, number == 1) for disk in disks]
            layers.append(runs.keep(parent, tmp_path / f"layer{number}"))
    with Connection(runs.hypervisor.uri) as connection:
        domain = connection.domain(vm.uuid)
        found = {disk.id: disk for disk in source_disks(domain.inactive_xml()) if disk.id in disks}
        assert (found["vdb"].kind, found["vdb"].path) == ("volume", f"{pool}/data")
        files = {name: located(domain, disk) for name, disk in found.items()}
        assert (files["vdb"].kind, files["vdb"].path) == ("file", str(lab.folder / "pool/data"))
    vm.destroy()
    for place, disk in enumerate(disks):
        written = f"write -P {48 + place} 3M 64k"
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", written, files[disk].path], check=True, capture_output=True)
    with runs.take(runs.run(vm, parent)) as off:
        assert [disk.id for disk in off.prepared.disks if disk.whole] == []
        assert off.prepared.consistency == "off"
        layers.append(runs.keep(off, tmp_path / "layer3"))
    for place, disk in enumerate(disks):
        data = restored([layer[disk] for layer in layers], tmp_path / disk).read_bytes()
        expected = bytearray(4 * MiB if disk == "vdc" else 8 * MiB)
        if disk == "vdd":
            expected[:MiB] = b"\x10" * MiB
        for number in (1, 2, 3):
            expected[number * MiB : number * MiB + 65536] = bytes([16 * number + place]) * 65536
        assert data == expected, disk


@pytest.fixture
def luks(lab, vm_prefix, libvirt_uri) -> Iterator[str]:
    """The XML of the source of an encrypted qcow2, whose key libvirt has."""
    key = lab.folder / "key"
    key.write_text("not-to-be-seen")
    image = lab.folder / "luks.qcow2"
    options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=200"
    secret_option = f"secret,id=key,file={key}"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "--object", secret_option, "-o", options, image, "8M"]
    for _ in range(20):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        # QEMU 7.2 measures how fast this machine is, and gives up where the clock of its thread counts in ticks.
        if "Unable to get accurate CPU usage" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    connection = libvirt.open(libvirt_uri)
    secret = connection.secretDefineXML(
        "<secret ephemeral='yes' private='yes'><usage type='volume'>"
        f"<volume>{vm_prefix}{lab.folder.name}</volume></usage></secret>"
    )
    secret.setValue(b"not-to-be-seen")
    yield (
        f"<source file='{image}'><encryption format='luks'><secret type='passphrase' uuid='{secret.UUIDString()}'/>"
        "</encryption></source>"
    )
    secret.undefine()
    connection.close()


def test_an_encrypted_disk_is_refused_unless_told_so(lab, luks, runs, restored, tmp_path):
    vm = lab.vm(["qcow2:8"], more=disk_xml("vdb", luks))
    vm.io("vdb", "write -P 0x42 1M 1M")
    refusal = pytest.raises(UnsupportedOperation, match="vdb is encrypted.*in plain text")
    with refusal as refused, runs.take(runs.run(vm)):
        pass
    assert "--exclude-disks vdb" in refused.value.hint
    assert "--encrypted-disks PLAIN" in refused.value.hint
    vm.untouched()
    with runs.take(runs.run(vm, settings={"EXCLUDE_DISKS": "vdb"})) as taken:
        assert [disk.id for disk in taken.prepared.disks] == ["vda"]
    settings = {"ENCRYPTED_DISKS": "PLAIN"}
    layers, parent = [], None
    for number in (1, 2):
        with runs.take(runs.run(vm, parent, settings=settings)) as parent:
            layers.append(runs.keep(parent, tmp_path / f"layer{number}")["vdb"])
        vm.io("vdb", "write -P 0x43 4M 64k")
    assert b"not-to-be-seen" not in parent.prepared.artifacts[-1].open().read()
    with runs.take(runs.run(vm, parent, settings=settings)) as parent:
        layers.append(runs.keep(parent, tmp_path / "layer3")["vdb"])
        assert not any(disk.whole for disk in parent.prepared.disks)
    data = restored(layers, tmp_path / "plain").read_bytes()
    assert data == bytes(MiB) + b"\x42" * MiB + bytes(2 * MiB) + b"\x43" * 65536 + bytes(4 * MiB - 65536)
    vm.destroy()
    for told in (settings, {}):
        refusal = pytest.raises(UnsupportedOperation, match="is off, and disk vdb is encrypted")
        with refusal as refused, runs.take(runs.run(vm, parent, settings=told)):
            pass
        assert "--exclude-disks vdb; or start the VM" in refused.value.hint
        assert ("--encrypted-disks PLAIN" in refused.value.hint) is not bool(told)
    with runs.take(runs.run(vm, settings={"EXCLUDE_DISKS": "vdb"})) as taken:
        assert [disk.id for disk in taken.prepared.disks] == ["vda"]


def test_a_disk_whose_file_was_away_at_the_start_is_missed(lab, runs, hypervisor):
    """libvirt takes it out of the running definition without a word, and nothing was said of it."""
    vm = lab.vm(["qcow2:8", "qcow2:8"], start=False)
    away = vm.disk("vdb")
    vm.change((f"<source file='{away}'/>", f"<source file='{away}' startupPolicy='optional'/>"))
    kept = away.rename(away.with_name("kept"))
    vm.start()
    (left,) = hypervisor.estimate(runs.run(vm)).left_out
    assert (left.id, left.missed, left.reason) == (
        "vdb",
        True,
        "its file was away when the VM was started (startupPolicy)",
    )
    assert hypervisor.estimate(runs.run(vm, settings={"EXCLUDE_DISKS": "vdb"})).left_out == ()
    vm.destroy()
    kept.rename(away)
    vm.start()
    assert hypervisor.estimate(runs.run(vm)).left_out == ()


def test_a_disk_of_no_bytes_is_refused_by_name(lab, runs, hypervisor):
    vm = lab.vm(["raw:8"], start=False)
    with vm.disk("vda").open("r+b") as file:
        file.truncate(0)
    with pytest.raises(UnsupportedOperation, match=r"disk vda \(.*\) has 0 bytes"):
        hypervisor.estimate(runs.run(vm))
