"""Overlays that runs have left on a VM's disks, and what others do to a VM that is held by them: told, merged, or kept.

The bytes are compared with what QEMU's own tools copied.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import threading
import time
from pathlib import Path
from xml.etree import ElementTree

import libvirt
import pytest

from backupcore.context import Context
from backupcore.errors import BackupError, Busy, HypervisorError, IncrementImpossible
from backupcore_libvirt.connection import Connection, Domain
from backupcore_libvirt.image_lock import keep_closed
from backupcore_libvirt.overlay.merge import Merger
from backupcore_libvirt.overlay.stack import overlay_path, stacks
from backupcore_libvirt.plugin import Libvirt
from backupcore_libvirt.premade.image import make_overlay

pytestmark = pytest.mark.usefixtures("every_qemu_dies")

MiB = 1 << 20


# What others do meanwhile


def test_an_internal_snapshot_that_was_taken_meanwhile_is_not_destroyed(lab, runs, same, tmp_path):
    vm = lab.vm(["qcow2:16"], iothread="disk")
    with pytest.raises(HypervisorError, match=r"snapshots .*\(mine\)") as told, runs.take(runs.run(vm)):
        vm.io("vda", "write -P 2 2M 1M")
        vm.domain.snapshotCreateXML("<domainsnapshot><name>mine</name></domainsnapshot>", 0)
        vm.io("vda", "write -P 3 2M 1M")
    assert "virsh snapshot-delete" in told.value.hint
    assert len(vm.overlays()) == 1
    with pytest.raises(HypervisorError, match="mine"):
        runs.recover(vm)
    with pytest.raises(HypervisorError, match="mine"), runs.take(runs.run(vm)) as taken:
        truth = vm.copy_truth(tmp_path / "truth")
        same([runs.keep(taken, tmp_path / "layer")], truth)
    assert len(vm.overlays()) == 1
    vm.domain.snapshotLookupByName("mine").delete()
    truth = vm.copy_truth(tmp_path / "after")
    runs.recover(vm)
    vm.plain()
    with runs.take(runs.run(vm)) as taken:
        same([runs.keep(taken, tmp_path / "last")], truth)


@pytest.mark.parametrize("managed", [True, False], ids=["managed", "to a file"])
def test_a_vm_whose_memory_was_saved_meanwhile_finds_its_disks(lab, runs, same, tmp_path, managed):
    vm = lab.vm(["qcow2:16"], iothread="disk")
    file = vm.folder / "memory"
    with pytest.raises(Busy, match="its memory is saved"), runs.take(runs.run(vm)):
        vm.io("vda", "write -P 2 2M 1M")
        truth = vm.copy_truth(tmp_path / "truth")
        vm.domain.managedSave(0) if managed else vm.domain.save(str(file))
    assert len(vm.overlays()) == 1
    vm.start() if managed else vm.connection.restore(str(file))
    runs.recover(vm)
    vm.plain()
    with runs.take(runs.run(vm)) as taken:
        same([runs.keep(taken, tmp_path / "layer")], truth)


def test_a_merge_waits_for_somebody_who_reads_the_disk_for_a_moment(lab, runs, tmp_path):
    vm = lab.vm(["qcow2:16"], iothread="disk")
    with runs.left_alone(runs.run(vm)):
        vm.io("vda", "write -P 2 2M 1M")
    with Connection(runs.hypervisor.uri) as connection, contextlib.ExitStack() as reader:
        reader.enter_context(keep_closed([vm.folder / "vda.qcow2"]))
        domain = connection.domain(vm.uuid)
        # Asked between two attempts, `check` ends what forbids the first one.
        Merger(connection, domain, tmp_path, reader.close).merge_all(stacks(domain)["vda"])
    runs.recover(vm)
    vm.plain()
    vm.io("vda", "read -P 2 2M 1M")


def test_what_another_configuration_has_put_on_a_disk_is_not_called_ones_own(lab, runs, wait_for):
    vm = lab.vm(["qcow2:16"], iothread="disk")
    other = Libvirt(runs.hypervisor.uri, lab.folder / "another")
    with runs.left_alone(runs.run(vm)):
        (path,) = vm.overlays()
        reads = f"it writes to {path}, while a backup of another configuration reads what lies below"
        assert other.find(vm.name).remarks == (reads,)
    (told,) = other.find(vm.name).remarks
    assert f"it writes to {path}, which a backup of another configuration has left" in told
    (told,) = runs.hypervisor.find(vm.name).remarks
    assert f"it writes to {path}, which a backup has left" in told
    runs.recover(vm)


def test_what_hinders_a_merge_before_and_after_a_backup_is_told_once(lab, runs, caplog):
    """A saved VM on whose overlay lies somebody's snapshot."""
    vm = lab.vm(["qcow2:16"], iothread="disk")
    xml = f"""<domainsnapshot><disks><disk name='vda' snapshot='external'><source file='{vm.folder / "mine.qcow2"}'/>
        </disk></disks></domainsnapshot>"""
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    with runs.left_alone(runs.run(vm)):
        vm.io("vda", "write -P 2 2M 1M")
    vm.domain.snapshotCreateXML(xml, flags)
    vm.domain.managedSave(0)
    caplog.clear()
    with pytest.raises(HypervisorError, match="somebody's snapshot lies on it") as told, runs.take(runs.run(vm)):
        pass
    warned = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert not [line for line in warned if told.value.message in line]
    vm.domain.managedSaveRemove(0)


def detach(vm, disk: str) -> None:
    root = ElementTree.fromstring(vm.domain.XMLDesc())
    found = next(one for one in root.iterfind("devices/disk") if one.find("target").get("dev") == disk)
    flags = libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG
    vm.domain.detachDeviceFlags(ElementTree.tostring(found, encoding="unicode"), flags)


@pytest.mark.parametrize("on", [True, False], ids=["live", "off"])
def test_an_external_snapshot_that_was_taken_meanwhile_is_told(lab, runs, wait_for, on):
    vm = lab.vm(["qcow2:16"], iothread="disk")
    xml = f"""<domainsnapshot><disks><disk name='vda' snapshot='external'><source file='{vm.folder / "mine.qcow2"}'/>
        </disk></disks></domainsnapshot>"""
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    with pytest.raises(HypervisorError, match="somebody's snapshot lies on it"), runs.take(runs.run(vm)):
        vm.domain.snapshotCreateXML(xml, flags)
        vm.io("vda", "write -P 3 2M 1M")
    if not on:
        # A definition of the user's own does not list what lies below.
        vm.destroy()
        root = ElementTree.fromstring(vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
        disk = root.find("devices/disk")
        disk.remove(disk.find("backingStore"))
        vm.connection.defineXML(ElementTree.tostring(root, encoding="unicode"))
    (path,) = vm.overlays()
    remarks = (f"somebody's snapshot lies on {path}, which a backup has left, so it is not merged",)
    wait_for(lambda: runs.hypervisor.find(vm.name).remarks == remarks, "the remark")
    with pytest.raises(HypervisorError, match="somebody's snapshot lies on it"):
        runs.recover(vm)
    if on:
        vm.commit("vda")
    else:
        mine = vm.folder / "mine.qcow2"
        subprocess.run(["qemu-img", "commit", "-q", "-f", "qcow2", mine], check=True)
        vm.change((str(mine), str(path)))
    runs.recover(vm)
    vm.plain()


def test_an_overlay_that_somebody_has_pulled_its_base_into_is_the_disk(lab, runs, same, tmp_path):
    """As `virsh blockpull`: there is nothing to merge it into any more, and nothing to tell."""
    vm = lab.vm(["qcow2:16"], iothread="disk")
    with runs.take(runs.run(vm)):
        vm.io("vda", "write -P 3 2M 1M")
        vm.domain.blockPull("vda")
        vm.settled("vda")
    (path,) = vm.overlays()
    assert vm.disk("vda") == path
    assert runs.recover(vm) == ()
    assert runs.hypervisor.find(vm.name).remarks == ()
    truth = vm.copy_truth(tmp_path / "truth")
    with runs.take(runs.run(vm)) as taken:
        same([runs.keep(taken, tmp_path / "layer")], truth)
    vm.destroy()
    assert runs.recover(vm) == ()
    assert runs.hypervisor.find(vm.name).remarks == ()
    assert vm.overlays() == [path]


@pytest.mark.parametrize("killed", [False, True], ids=["ends", "killed"])
def test_a_disk_that_was_detached_meanwhile_is_told(lab, runs, wait_for, killed):
    """Its own file lacks what was written during the backup, and looks as if it were all of it."""
    vm = lab.vm(["raw:16", "raw:8"], iothread="controller")
    run = runs.run(vm)

    def during() -> None:
        with vm.suspended():
            vm.io("vdb", "write -P 5 0 1M")
        detach(vm, "vdb")

    if killed:
        with runs.left_alone(run):
            during()
        runs.recover(vm)
    told = pytest.raises(HypervisorError, match="a disk was detached during a backup")
    with told as error, runs.take(runs.run(vm) if killed else run):
        if not killed:
            during()
    (path,) = vm.overlays()
    remarks = (f"{path} holds what the VM has written to a disk that it does not have any more",)
    wait_for(lambda: runs.hypervisor.find(vm.name).remarks == remarks, "the remark")
    assert f"qemu-img commit -f qcow2 {path}" in error.value.hint
    plain_disk = vm.folder / "vdb.raw"
    assert plain_disk.read_bytes()[:MiB] == bytes(MiB)
    subprocess.run(["qemu-img", "commit", "-q", "-f", "qcow2", path], check=True)
    assert plain_disk.read_bytes()[:MiB] == b"\x05" * MiB
    path.unlink()
    runs.recover(vm)
    assert runs.hypervisor.find(vm.name).remarks == ()
    assert list(runs.hypervisor.scratch.iterdir()) == []


def test_what_lies_in_the_place_of_an_overlay_hinders_no_backup(lab, runs):
    vm = lab.vm(["qcow2:16"], iothread="disk")
    path = Path(overlay_path(str(vm.disk("vda")), "0" * 32, "vda", temporary=True))
    make = {
        "cut off": path.touch,  # whoever made it was killed
        "FIFO": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to("/etc/passwd"),
        "folder": path.mkdir,
    }
    for what, put in make.items():
        put()
        assert runs.hypervisor.find(vm.name).remarks == (), what
        with runs.take(runs.run(vm)):
            pass
        assert vm.overlays() == ([] if what == "cut off" else [path]), what
        if what in ("FIFO", "link"):
            path.unlink()


def test_nobody_merges_an_overlay_under_the_reader(lab, runs, take, same, tmp_path):
    """Neither by hand nor with another configuration: of raw files qemu-nbd itself keeps nobody away."""
    vm = lab.vm(["raw:8"], iothread="disk")
    vm.io("vda", "write -P 1 0 1M")
    truth = vm.copy_truth(tmp_path / "truth")
    refused = []

    def during() -> None:
        vm.io("vda", "write -P 2 0 1M")
        flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE
        with pytest.raises(libvirt.libvirtError, match="lock"):
            vm.domain.blockCommit("vda", str(vm.folder / "vda.raw"), None, 0, flags)
        (tmp_path / "other").mkdir()
        with Context(tmp_path / "other") as ctx, pytest.raises(Busy, match="still read by a backup") as error:
            runs.hypervisor.recover(vm.identity, (), ctx)
        refused.append(error.value)

    _, layer = take(vm, during=during)
    same([layer], truth)
    assert len(refused) == 1
    vm.plain()


# What dead runs have left


@pytest.mark.parametrize("on", [True, False], ids=["live", "off"])
def test_what_a_dead_run_has_left_is_merged_by_a_recovery(lab, runs, take, same, tmp_path, on):
    vm = lab.vm(["qcow2:16", "raw:8"], iothread="disk")
    full, layer = take(vm)
    with runs.left_alone(runs.run(vm, full)):
        vm.io("vda", "write -P 2 2M 1M")
        vm.io("vdb", "write -P 3 2M 1M")
    (state,) = [one for one in runs.hypervisor.vms() if one.vm.uuid == vm.uuid]
    assert len(state.remarks) == 2
    assert f"vmkeep recover {vm.name} merges it" in state.remarks[0]
    if not on:
        vm.destroy()
    done = runs.recover(vm)
    assert sum("merged the overlay" in line for line in done) == 2
    assert runs.recover(vm) == ()
    vm.plain()
    truth = vm.copy(tmp_path / "truth")
    taken, above = take(vm, full)
    same([layer, above], truth)
    assert not taken.prepared.disks[0].whole


@pytest.mark.parametrize("which", ["overlay", "base"])
def test_what_qemus_user_has_put_into_a_header_is_not_followed_by_root(lab, runs, which):
    """The files are QEMU's user's: a header that names another file would have us read it, or write to it."""
    vm = lab.vm(["qcow2:16"], iothread="disk")
    with runs.left_alone(runs.run(vm)):
        pass
    vm.destroy()
    (overlay,) = vm.overlays()
    base, other = vm.folder / "vda.qcow2", vm.folder / "other"
    changed, *below = (overlay, "-F", "qcow2", "-b", base) if which == "overlay" else (base,)
    options = ["-o", f"data_file={other}"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, *below, changed, "16M"], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 0x41 0 64k", overlay], check=True, capture_output=True)
    before = base.read_bytes(), other.read_bytes()
    with pytest.raises(HypervisorError, match=r"vda is not merged while the VM is off: .*its data in another file"):
        runs.recover(vm)
    assert (base.read_bytes(), other.read_bytes()) == before
    assert overlay.exists()


def test_what_a_dead_run_has_left_is_merged_by_the_next_run(lab, runs, take, same, tmp_path):
    vm = lab.vm(["qcow2:16"], iothread="disk")
    full, layer = take(vm)
    for number in range(2):
        with runs.left_alone(runs.run(vm, full)):
            vm.io("vda", f"write -P {number + 2} {number + 2}M 1M")
    assert len(vm.overlays()) == 1
    truth = vm.copy_truth(tmp_path / "truth")
    taken, above = take(vm, full)
    same([layer, above], truth)
    assert not taken.prepared.disks[0].whole
    vm.plain()


def test_a_disk_that_got_another_name_before_its_overlay_was_merged(lab, runs, take, same, tmp_path):
    vm = lab.vm(["qcow2:16"], iothread="disk")
    with runs.left_alone(runs.run(vm)):
        vm.io("vda", "write -P 2 2M 1M")
    vm.destroy()
    vm.change(("<target dev='vda' bus='virtio'/>", "<target dev='vdb' bus='virtio'/>"))
    truth = vm.copy(tmp_path / "truth")["vdb"]
    assert len(runs.hypervisor.find(vm.name).remarks) == 1
    runs.recover(vm)
    assert vm.overlays() == []
    assert vm.disk("vdb").name == "vda.qcow2"
    same([{"vdb": vm.disk("vdb")}], {"vdb": truth})


def test_a_vm_that_cannot_leave_its_overlay_has_no_second_one_at_rest(lab, runs, same, tmp_path):
    """Where AppArmor (libvirt before 12.1) confines a VM that was started on it. Here a lock keeps the merge off."""
    vm = lab.vm(["qcow2:16"], iothread="disk")
    with runs.left_alone(runs.run(vm)):
        vm.io("vda", "write -P 1 1M 1M")
    parent, layers = None, []
    with keep_closed([vm.folder / "vda.qcow2"]):
        for number in range(3):
            vm.io("vda", f"write -P {number + 2} {number + 2}M 1M")
            truth = vm.copy_truth(tmp_path / f"truth{number}")
            with pytest.raises(Busy, match="lock"), runs.take(runs.run(vm, parent)) as taken:
                layers.append(runs.keep(taken, tmp_path / f"layer{number}"))
                assert len(vm.overlays()) == 2
            same(layers, truth)
            assert [disk.whole for disk in taken.prepared.disks] == [number == 0]
            assert len(vm.overlays()) == 1
            parent = taken
    runs.recover(vm)  # or the guard of the last run has merged it, as soon as it could
    vm.plain()
    with pytest.raises(IncrementImpossible, match="at the last backup it was"), runs.take(runs.run(vm, parent)):
        pass
    truth = vm.copy_truth(tmp_path / "truth")
    with runs.take(runs.run(vm)) as taken:
        same([runs.keep(taken, tmp_path / "layer")], truth)


def test_a_run_that_ends_before_the_instant_leaves_nothing(lab, runs, monkeypatch):
    vm = lab.vm(["qcow2:16", "raw:8"], iothread="disk")
    run = runs.run(vm)

    def fails(*_: object, **__: object) -> None:
        raise HypervisorError("no snapshot")

    monkeypatch.setattr("backupcore_libvirt.connection.Domain.snapshot", fails)
    with pytest.raises(HypervisorError, match="no snapshot"), runs.take(run):
        pass
    vm.plain()
    vm.untouched()


def test_overlays_that_nothing_uses_yet_are_removed(lab, runs, tmp_path):
    """A run was killed between making them and the instant; a file that holds something is another matter."""
    vm = lab.vm(["qcow2:16"], iothread="disk")
    path = overlay_path(str(vm.disk("vda")), "0" * 32, "vda", temporary=True)
    make_overlay(Path(path), 16 * MiB, str(vm.disk("vda")), "qcow2")
    assert runs.hypervisor.find(vm.name).remarks == ()
    runs.recover(vm)
    vm.plain()


def test_a_vm_that_was_defined_anew_meanwhile_and_started_on_its_old_disk(lab, runs, take, tmp_path, wait_for):
    """What it wrote during the backup lies in an overlay that nothing uses: told by every way, and never removed."""
    vm = lab.vm(["qcow2:16"], iothread="disk")
    full, _ = take(vm)
    old = vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    run = runs.run(vm, full)
    with pytest.raises(HypervisorError, match="the VM does not use it") as told, runs.take(run) as taken:
        vm.io("vda", "write -P 2 2M 1M")
        vm.destroy()
        vm.connection.defineXML(old)
        vm.start()
        runs.keep(taken, tmp_path / "layer")
    (path,) = vm.overlays()
    assert str(path) in told.value.message
    assert f"qemu-img convert -f qcow2 -O qcow2 {path} COPY" in told.value.hint
    remarks = (f"{path} holds what the VM has written, and the VM does not use it",)
    # The guard of a run whose release went wrong tries it once more: it is a run of the VM until then.
    wait_for(lambda: runs.hypervisor.find(vm.name).remarks == remarks, "the remark")
    runs.recover(vm)
    assert vm.overlays() == [path]
    path.unlink()


def test_a_running_vm_that_was_defined_anew_meanwhile(lab, runs, take, same, tmp_path):
    vm = lab.vm(["qcow2:16"], iothread="disk")
    old = vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)

    def during() -> None:
        vm.io("vda", "write -P 2 2M 1M")
        vm.connection.defineXML(old)

    full, layer = take(vm, during=during)
    vm.plain()
    truth = vm.copy_truth(tmp_path / "truth")
    _, above = take(vm, full)
    same([layer, above], truth)


# libvirtd


def again(vm, daemon) -> None:
    """Connect anew to a libvirtd that was killed."""
    name = vm.name
    daemon.kill()
    daemon.start()
    vm.connection = libvirt.open(daemon.uri)
    vm.domain = vm.connection.lookupByName(name)


def test_libvirtd_is_killed_while_the_disks_are_read(daemon, private, every_vm, same, tmp_path):
    vm, runs = private
    vm.io("vda", "write -P 1 0 1M")
    truth = vm.copy_truth(tmp_path / "truth")
    with runs.take(runs.run(vm)) as full:
        again(vm, daemon)
        vm.io("vda", "write -P 2 1M 1M")
        layer = runs.keep(full, tmp_path / "layer")
    same([layer], truth)
    vm.plain()
    truth = vm.copy_truth(tmp_path / "2")
    with runs.take(runs.run(vm, full)) as taken:
        same([layer, runs.keep(taken, tmp_path / "layer2")], truth)
    assert not any(disk.whole for disk in taken.prepared.disks)


def test_libvirtd_is_killed_before_a_merge_has_ended(daemon, private, every_vm, same, tmp_path, monkeypatch):
    vm, runs = private
    with runs.take(runs.run(vm)) as full:
        layer = runs.keep(full, tmp_path / "layer")
    pivot = Domain.pivot
    killed = []

    def away(domain: Domain, disk: str) -> None:
        if not killed:
            killed.append(disk)
            again(vm, daemon)
        pivot(domain, disk)

    monkeypatch.setattr(Domain, "pivot", away)
    with runs.take(runs.run(vm, full)) as taken:
        vm.io("vda", "write -P 2 1M 1M")
        above = runs.keep(taken, tmp_path / "above")
    assert killed == ["vda"]
    vm.plain()
    truth = vm.copy_truth(tmp_path / "2")
    with runs.take(runs.run(vm, taken)) as last:
        same([layer, above, runs.keep(last, tmp_path / "last")], truth)
    assert not any(disk.whole for disk in last.prepared.disks)


@pytest.mark.soak
def test_libvirtd_is_killed_within_the_call_that_puts_the_overlays_on(daemon, private, every_vm, tmp_path, monkeypatch):
    """The guest goes on, and what lies where is known afterwards, or told: no write is lost, none is passed over."""
    vm, runs = private
    snapshot = Domain.snapshot
    for number, delay in enumerate([0, 0.01, 0.02, 0.03, 0.05, 0.08] * 3):

        def away(domain: Domain, xml: str, *, delay: float = delay) -> None:
            def begin() -> None:
                with contextlib.suppress(BackupError):
                    snapshot(domain, xml)

            call = threading.Thread(target=begin)
            call.start()
            time.sleep(delay)
            again(vm, daemon)
            call.join()

        monkeypatch.setattr(Domain, "snapshot", away)
        before = vm.domain.ID()
        with contextlib.suppress(BackupError), runs.take(runs.run(vm)):
            pass
        assert vm.domain.ID() == before
        vm.io("vda", f"write -P {number + 1} {number}k 1k")
        told = []
        try:
            runs.recover(vm)
        except HypervisorError as error:
            told.append(error.message)
        if told:
            assert "it is not clear what disk" in told[0]
            return
        vm.plain()
