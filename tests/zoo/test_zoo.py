"""Every shape of disk and VM of the table, through its life: backed up on and off, restored, flattened, replaced.

What belongs together in `make test` is one VM: each shape is met there live and off, with a full, increments and their
restore. `make soak` has each shape in a VM of its own, with and without an I/O thread, in every order.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import libvirt
import pytest

from lab.host import Host
from lab.vm import same
from tests.zoo import table
from tests.zoo.firmware import TPM, VARIABLES, Variables
from tests.zoo.life import Life, Zoo, kept
from tests.zoo.machines import ALL, LONG_VM, MANY, MORE, ODD_VM, THREADS, Machine, threaded
from tests.zoo.missed import MISSED
from tests.zoo.shape import Shape, convert, made_of, plain, write

pytestmark = pytest.mark.timeout(600)  # dozens of disks, each compared by programs of its own

Begin = Callable[..., Life]
PLAIN = Shape(name="plain", words="", make=plain)


@pytest.fixture
def begin(make_vm, libvirt_uri: str, vm_folder: Path) -> Begin:
    def made(machine: Machine, **options: object) -> Life:
        zoo = Zoo(make_vm([], label="zoo", start=False, iothreads=machine.threads, **options), machine)
        zoo.build()
        return Life(Host(vm_folder, zoo.vm, libvirt_uri, driver="lab"), zoo)

    return made


def defined(life: Life, increment: int) -> None:
    """Restored as a VM of its own: its disks are to the guest what they were, and it starts."""
    vm = life.zoo.vm
    made = life.restore(increment, life.zoo.truths[increment], "--define", "--name", f"{vm.folder.name}-again")
    domain = vm.connection.lookupByUUIDString(made["uuid"])
    try:
        stored = vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        assert kept(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)) == kept(stored)
        domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
    finally:
        if domain.isActive():
            domain.destroy()
        domain.undefine()


def test_many_disks_of_every_shape(begin: Begin):
    """What QEMU has tracked live is read while the VM is off, and a flattened image is restored in place."""
    life = begin(MANY)
    assert len(life.zoo.made) > 40
    life.backup("on")
    life.backup("on")
    life.backup("off")
    life.ask("image", "flatten", "1", "--to", "1")
    defined(life, 2)
    life.in_place(1, life.zoo.truths[1])


def test_disks_with_io_threads_of_many_shapes(begin: Begin):
    """In QEMU before 8.2.3 each gets an overlay for the time of the backup."""
    life = begin(THREADS)
    life.backup("on")
    life.backup("on")
    life.restore(1, life.zoo.truths[1])


@pytest.mark.parametrize("machine", [ODD_VM, LONG_VM], ids=lambda machine: machine.name)
def test_names_of_vms(begin: Begin, machine: Machine):
    life = begin(machine)
    life.backup("off")
    life.backup("on")
    made = life.restore(1, life.zoo.truths[1])
    assert Path(made["xml"]).parent.is_dir()
    if machine.more:
        assert ElementTree.parse(made["xml"]).findtext("title") == ElementTree.fromstring(MORE[0]).text


def test_the_readme_has_the_table():
    text = table.README.read_text()
    assert table.written(text) == text, "python -m tests.zoo.table"


def test_disks_that_no_backup_can_hold(begin: Begin):
    """All of them beside an ordinary one; then without that."""
    life = begin(Machine(name="missed", shapes=(PLAIN,)))
    host, vm = life.host, life.zoo.vm
    root = ElementTree.fromstring(vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
    root.append(ElementTree.fromstring("<memoryBacking><access mode='shared'/></memoryBacking>"))  # for vhost-user
    devices = root.find("devices")
    (ordinary,) = devices.findall("disk")
    devices.extend(ElementTree.fromstring(missed.xml) for missed in MISSED)
    vm.connection.defineXML(ElementTree.tostring(root, encoding="unicode"))
    done = host.run("--json", "backup", vm.name)
    assert done.code == 3, done.err
    found = json.loads(done.out)
    assert [disk["id"] for disk in found["disks"]] == ["vda"]
    reasons = {left["id"]: left["reason"] for left in found["left_out"]}
    assert set(reasons) == {missed.id for missed in MISSED}
    for missed in MISSED:
        assert reasons[missed.id].startswith(missed.reason), missed.name
        (line,) = [
            line for line in found["warnings"] if line.startswith(f"disk {missed.id} is not in it: {missed.reason}")
        ]
        assert "vmkeep vm updateconf" in line

    names = ",".join(reasons)
    assert f"--exclude-disks {names}" in line
    assert host.run("vm", "updateconf", vm.name, "--exclude-disks", names).code == 0
    assert {left["reason"] for left in host.backup()["left_out"]} == {"excluded (EXCLUDE_DISKS)"}

    devices.remove(ordinary)
    vm.connection.defineXML(ElementTree.tostring(root, encoding="unicode"))  # and without the setting
    refused = host.run("backup", vm.name)
    assert refused.code == 9
    assert all(f"{missed.id}: {missed.reason}" in refused.err for missed in MISSED)


def soaked(variables: Variables) -> object:
    """Those of secure boot are variables as any others: they stand for all."""
    return pytest.param(variables, id=variables.name, marks=[] if variables.quick else pytest.mark.soak)


def opened(path: Path, variables: Variables) -> str:
    return made_of(path, variables.format).options


def connection_version(uri: str) -> tuple[int, int]:
    connection = libvirt.open(uri)
    number = connection.getLibVersion()
    connection.close()
    return number // 1_000_000, number // 1_000 % 1_000


@pytest.mark.parametrize("variables", [soaked(one) for one in VARIABLES])
def test_firmware_variables_and_a_tpm(begin: Begin, variables: Variables, libvirt_uri: str):
    machine = Machine(name="firmware", shapes=(PLAIN,), variables=variables.format)
    found = connection_version(libvirt_uri)
    if found < variables.since:
        with pytest.raises(libvirt.libvirtError, match="failed to validate"):
            begin(machine, firmware=variables.files(), devices=TPM)
        return
    life = begin(machine, firmware=variables.files(), devices=TPM)
    vm, host = life.zoo.vm, life.host
    vm.domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)  # the firmware would write its variables for a while
    nvram = Path(ElementTree.fromstring(vm.domain.XMLDesc()).findtext("os/nvram"))
    tpm = Path(f"/var/lib/libvirt/swtpm/{vm.uuid}/tpm2/tpm2-00.permall")
    host.backup()
    made = host.ask("restore", "1", "--to", str(host.folder / "to"))
    restored, truth = Path(made["nvram"]), convert(opened(nvram, variables), host.folder / "truth")
    assert same(convert(opened(restored, variables), host.folder / "held"), truth)
    assert {one["artifact"]: Path(one["path"]).read_bytes() for one in made["beside"]} == {"tpm": tpm.read_bytes()}
    vm.destroy()
    write(opened(nvram, variables), "write -z 0 64k")
    host.ask("restore", "1", "--in-place")
    assert same(convert(opened(nvram, variables), host.folder / "again"), truth)


@pytest.mark.soak
@pytest.mark.parametrize("order", ["on-on-off", "off-off-on"])
@pytest.mark.parametrize("thread", [False, True], ids=["main-loop", "io-thread"])
@pytest.mark.parametrize("shape", ALL, ids=lambda shape: shape.name)
def test_each_shape_by_itself(begin: Begin, shape: Shape, thread: bool, order: str):
    if thread and (shape.alone or shape.bus not in ("virtio", "scsi")):
        return  # refused by a QEMU that needs overlays, as the README has it; other buses have no threads
    machine = Machine(
        name=shape.name,
        shapes=(PLAIN, *(threaded((shape,)) if thread else (shape,))),
        threads=int(thread),
        controller="iothread='1'" if thread and shape.bus == "scsi" else "",
    )
    life = begin(machine)
    for state in order.split("-"):
        life.backup(state)
    life.ask("image", "flatten", "1", "--to", "1")
    life.restore(1, life.zoo.truths[1])
    defined(life, 2)
    life.in_place(1, life.zoo.truths[1])
