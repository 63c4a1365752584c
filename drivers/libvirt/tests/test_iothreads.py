"""VMs whose disks an I/O thread serves: which ones they are, and that they outlive their backups in this QEMU."""

from __future__ import annotations

import libvirt
import pytest

from backupcore_libvirt.connection import Connection
from backupcore_libvirt.disks import source_disks
from backupcore_libvirt.iothreads import named_by, with_iothreads
from backupcore_libvirt.versions import survives_clients_of_iothreads


@pytest.mark.parametrize("where", ["disk", "controller"])
def test_a_vm_with_an_io_thread_survives_its_backups(lab, runs, same, tmp_path, where):
    """By whichever mechanism this QEMU needs; the reader comes and goes, as a killed one does."""
    vm = lab.vm(["qcow2:16", "qcow2:9"], iothread=where)
    layers, parent = [], None
    for number in range(3):
        if where == "controller":
            vm.destroy()  # what the monitor writes there kills QEMU 7.2 by itself
        vm.write("vda", f"write -P {number + 1} {number}M 64k", f"write -z {number + 8}M 64k")
        vm.write("vdb", f"write -P {number + 17} {number}M 64k")
        truth = vm.copy(tmp_path / f"truth{number}")
        if not vm.active:
            vm.start()
        before = vm.domain.ID()
        with runs.take(runs.run(vm, parent)) as parent:
            layers.append(runs.keep(parent, tmp_path / f"layer{number}"))
        same(layers, truth)
        assert [disk.whole for disk in parent.prepared.disks] == [number == 0] * 2
        assert (vm.domain.ID(), vm.job()) == (before, 0), "its QEMU has not died"
        assert not list(vm.folder.glob("*.backupcore-*"))


@pytest.mark.parametrize(
    ("version", "survives"),
    [
        ((5, 2, 0), False),
        ((7, 2, 22), False),
        ((8, 2, 2), False),
        ((8, 2, 3), True),
        ((8, 2, 10), True),
        ((8, 3, 0), False),  # none was released: it is not known
        ((9, 0, 0), True),
        ((10, 0, 13), True),
    ],
)
def test_the_versions_of_qemu_that_survive(version, survives):
    assert survives_clients_of_iothreads(version) is survives


def test_a_vm_without_an_io_thread_is_held_by_a_backup_job(small, runs):
    """Also in a QEMU that would die; and a disk that no backup holds may have one."""
    with runs.take(runs.run(small, tracked=False)):
        assert small.job() != 0
        assert not list(small.folder.glob("*.backupcore-*"))


def test_disks_with_io_threads_are_known_by_definition_and_by_qemu(lab, runs):
    """A command line of the user's gives a disk a thread that the definition does not know."""
    vm = lab.vm(["qcow2:8", "qcow2:8"], start=False)
    namespace = "xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'"
    more = (
        "<qemu:commandline><qemu:arg value='-object'/><qemu:arg value='iothread,id=own'/></qemu:commandline>"
        "<qemu:override><qemu:device alias='ua-vdb'><qemu:frontend>"
        "<qemu:property name='iothread' type='string' value='own'/></qemu:frontend></qemu:device></qemu:override>"
    )
    text = vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    text = text.replace("<domain ", f"<domain {namespace} ").replace("</domain>", f"{more}</domain>")
    vm.connection.defineXML(text)
    vm.start()
    with Connection(runs.hypervisor.uri) as connection:
        threads = with_iothreads(connection.domain(vm.uuid), ["vda", "vdb"])
    assert threads == {"vdb": "QEMU's command line"}


def test_a_disk_that_another_process_serves_is_left_out_by_name():
    """vhost-user-blk: QEMU itself has no such disk, so nothing that asks QEMU can hold it."""
    xml = (
        "<domain><devices><disk type='vhostuser' device='disk'><driver name='qemu' type='raw'/>"
        "<source type='unix' path='/run/vhost.sock'/><target dev='vda' bus='virtio'/></disk></devices></domain>"
    )
    (disk,) = source_disks(xml)
    assert disk.left_out == "a vhostuser disk; file and block disks are supported"


@pytest.mark.parametrize(
    ("disk", "controller", "found"),
    [
        ("<driver name='qemu' type='raw' iothread='1'/>", "", True),
        ("<driver name='qemu' queues='2'><iothreads><iothread id='1'/></iothreads></driver>", "", True),
        ("<address type='drive' controller='1'/>", "<driver iothread='1'/>", True),
        ("<address type='drive' controller='1'/>", "<driver><iothreads><iothread id='1'/></iothreads></driver>", True),
        ("<address type='drive' controller='0'/>", "<driver iothread='1'/>", False),
        ("<driver name='qemu' type='raw'/>", "<driver iothread='1'/>", False),
    ],
)
def test_every_way_in_which_a_definition_gives_a_disk_a_thread(disk, controller, found):
    bus = "scsi" if "type='drive'" in disk else "virtio"
    xml = (
        f"<domain><devices><disk type='file' device='disk'>{disk}<target dev='vda' bus='{bus}'/></disk>"
        f"<controller type='scsi' index='1'>{controller}</controller></devices></domain>"
    )
    assert named_by(xml, ["vda"]) == ({"vda": "its definition"} if found else {})
