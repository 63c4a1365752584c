"""INCREMENT_MODE=SNAPSHOT: what leads to a whole disk, to a full, or back to plain disks, and what is never touched."""

from __future__ import annotations

import subprocess
from pathlib import Path
from xml.etree import ElementTree

import libvirt
import pytest

from backupcore.errors import Busy, HypervisorError, IncrementImpossible, TargetFull, UnsupportedOperation
from lab.vm import same as same_bytes

MiB = 1 << 20
CBT = {"MODE": "INCREMENT", "INCREMENT_MODE": "CBT"}
SNAPSHOT = {"MODE": "INCREMENT", "INCREMENT_MODE": "SNAPSHOT"}


def source(vm, disk: str, *, inactive: bool = False) -> str:
    root = ElementTree.fromstring(vm.domain.XMLDesc(2 if inactive else 0))
    element = next(d for d in root.iterfind("devices/disk") if d.find("target").get("dev") == disk)
    return element.find("source").get("file")


def overlays(vm) -> list[Path]:
    return sorted(path for path in vm.folder.iterdir() if "backupcore" in path.name)


@pytest.fixture
def take(runs, tmp_path):
    """One backup, kept in a folder: (taken, its layer)."""

    def one(vm, parent=None, settings=SNAPSHOT, **more):
        run = runs.run(vm, parent, settings=settings, **more)
        with runs.take(run) as taken:
            return taken, runs.keep(taken, tmp_path / run.id)

    return one


def whole(taken) -> dict[str, str | None]:
    """Disk -> why it is whole, None for one that is not."""
    return {disk.id: disk.reason if disk.whole else None for disk in taken.prepared.disks}


@pytest.mark.parametrize("on", [True, False], ids=["live", "off"])
def test_switching_between_the_modes(lab, runs, take, same, tmp_path, on):
    vm = lab.vm(["raw:16", "qcow2:16"], start=on)

    def change(number: int) -> None:
        if on:
            vm.io("vda", f"write -P {number} {number}M 1M")
            vm.io("vdb", f"write -P {number} {number}M 1M")

    plain = {disk: str(vm.folder / f"{disk}.{shape}") for disk, shape in (("vda", "raw"), ("vdb", "qcow2"))}
    by_bitmaps, _ = take(vm, settings=CBT)
    take(vm, settings=CBT)  # the chain of another datastore
    change(1)
    with pytest.raises(IncrementImpossible, match="no overlay has collected changes"):
        take(vm, by_bitmaps)
    full, layer = take(vm)
    assert vm.checkpoints() == set()
    assert len(overlays(vm)) == 2
    change(2)
    truth = vm.copy_truth(tmp_path / "1") if on else vm.copy_disks(tmp_path / "1")
    increment, above = take(vm, full)
    same([layer, above], truth)
    change(3)
    with pytest.raises(IncrementImpossible, match="SNAPSHOT is no longer set"):
        take(vm, increment, settings=CBT)
    assert len(overlays(vm)) == 2, "nothing was touched"
    truth = vm.copy_truth(tmp_path / "2") if on else vm.copy_disks(tmp_path / "2")
    full, layer = take(vm, settings=CBT)
    same([layer], truth)
    assert overlays(vm) == []
    for inactive in (True, False):
        assert {disk: source(vm, disk, inactive=inactive) for disk in plain} == plain
    change(4)
    truth = vm.copy_truth(tmp_path / "3") if on else vm.copy_disks(tmp_path / "3")
    _, above = take(vm, full, settings=CBT)
    same([layer, above], truth)
    take(vm)
    assert len(overlays(vm)) == 2
    take(vm, settings={"MODE": "FULL", "INCREMENT_MODE": "SNAPSHOT"}, tracked=False)
    assert overlays(vm) == []
    if not on:
        vm.start()
        vm.untouched()


def test_a_second_datastore_gets_fulls_and_touches_nothing(lab, runs, take, same, caplog, tmp_path):
    vm = lab.vm(["raw:16"])
    first, layer = take(vm)
    vm.io("vda", "write -P 1 1M 1M")
    mine = overlays(vm)
    elsewhere, full = take(vm, keep=(first.run.point,))
    assert "one chain of increments" in caplog.text
    assert "another datastore" in caplog.text
    assert "INCREMENT_MODE=CBT" in caplog.text
    same([full], vm.copy_truth(tmp_path / "1"))
    assert overlays(vm) == mine
    with pytest.raises(IncrementImpossible, match="is in another datastore"):
        take(vm, elsewhere, keep=(first.run.point, elsewhere.run.point))
    vm.io("vda", "write -P 2 2M 1M")
    truth = vm.copy_truth(tmp_path / "2")
    _, above = take(vm, first, keep=(first.run.point, elsewhere.run.point))
    same([layer, above], truth)
    # The first datastore's image was deleted: the second one has the chain from its next full on.
    again, full = take(vm, spent=(first.run.point, elsewhere.run.point), keep=(elsewhere.run.point,))
    vm.io("vda", "write -P 3 3M 1M")
    truth = vm.copy_truth(tmp_path / "3")
    _, above = take(vm, again)
    same([full, above], truth)


def test_disks_that_come_go_grow_and_shrink(lab, runs, take, same, tmp_path):
    vm = lab.vm(["raw:16", "qcow2:16"])
    extra = vm.folder / "extra.raw"
    subprocess.run(["qemu-img", "create", "-q", "-f", "raw", extra, "8M"], check=True)
    parent, layer = take(vm)
    layers = [layer]
    vm.domain.attachDeviceFlags(
        f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{extra}'/>"
        "<target dev='vdc' bus='virtio'/><alias name='ua-vdc'/></disk>",
        libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG,
    )
    vm.io("vdc", "write -P 1 0 1M")
    vm.domain.blockResize("vda", 32 * MiB + 512, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    vm.io("vda", "write -P 2 31M 1M")
    truth = vm.copy_truth(tmp_path / "1")
    parent, layer = take(vm, parent)
    layers.append(layer)
    assert whole(parent) == {"vda": None, "vdb": None, "vdc": "added since the last backup"}
    assert parent.prepared.disks[0].virtual_size == 32 * MiB + 512
    same(layers, truth)
    # Shrunk and grown again: what lay behind the cut reads as zeros, and the overlay says so.
    vm.io("vdb", "write -P 3 15M 1M")
    parent, layer = take(vm, parent)
    layers.append(layer)
    vm.destroy()
    top = source(vm, "vdb")
    for size in ("8M", "16M"):
        subprocess.run(["qemu-img", "resize", "-q", "-f", "qcow2", "--shrink", top, size], check=True)
    truth = vm.copy_disks(tmp_path / "2")
    assert (truth["vdb"].read_bytes()[-MiB:]) == bytes(MiB)
    parent, layer = take(vm, parent)
    layers.append(layer)
    assert whole(parent) == {"vda": None, "vdb": None, "vdc": None}
    same(layers, truth)
    subprocess.run(["qemu-img", "resize", "-q", "-f", "qcow2", "--shrink", source(vm, "vdb"), "8M"], check=True)
    truth = vm.copy_disks(tmp_path / "3")
    shrunk, layer = take(vm, parent)
    assert whole(shrunk)["vdb"] == f"it has shrunk from {16 * MiB} to {8 * MiB} bytes"
    same([{"vdb": layer["vdb"]}], {"vdb": truth["vdb"]})
    # And back to plain disks, with the size that the guest has seen.
    take(vm, settings=CBT)
    assert overlays(vm) == []
    assert (vm.folder / "vdb.qcow2").exists()
    vm.start()
    assert vm.domain.blockInfo("vdb")[0] == 8 * MiB


def test_disks_that_were_swapped_are_taken_whole(lab, take):
    vm = lab.vm(["raw:16", "raw:16", "raw:16"])
    parent, _ = take(vm)
    vm.destroy()
    first, second = source(vm, "vda"), source(vm, "vdb")
    vm.change((first, "X"), (second, first), ("X", second))
    with pytest.raises(UnsupportedOperation, match="its definition puts other files below disk vda"):
        take(vm, parent)
    first, second = (f"'{vm.folder}/{disk}.raw'" for disk in ("vda", "vdb"))
    vm.change((first, "X"), (second, first), ("X", second))
    taken, _ = take(vm, parent)
    assert whole(taken) == {
        "vda": "no overlay has collected changes since the last backup",
        "vdb": "no overlay has collected changes since the last backup",
        "vdc": None,
    }


def test_a_vm_defined_anew_with_its_plain_disks_is_put_right_while_it_runs(lab, take, caplog):
    vm = lab.vm(["raw:16"])
    before = vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    parent, _ = take(vm)
    vm.io("vda", "write -P 1 1M 1M")
    vm.connection.defineXML(before)
    assert source(vm, "vda", inactive=True).endswith(".raw")
    take(vm, parent)
    assert "was defined anew" in caplog.text
    vm.io("vda", "write -P 2 2M 1M")  # is in the overlay only
    vm.destroy()
    vm.start()
    vm.io("vda", "read -P 1 1M 1M", "read -P 2 2M 1M")


def test_snapshots_and_checkpoints_of_others_rule_overlays_out(lab, runs, take, same, wait_for, caplog, tmp_path):
    vm = lab.vm(["qcow2:16"])
    parent, layer = take(vm)
    vm.io("vda", "write -P 1 1M 1M")
    theirs = vm.folder / "theirs.qcow2"
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    shape = f"<disk name='vda' snapshot='external'><source file='{theirs}'/></disk>"
    snapshot = vm.domain.snapshotCreateXML(
        f"<domainsnapshot><name>s1</name><disks>{shape}</disks></domainsnapshot>", flags
    )
    files = overlays(vm)
    with pytest.raises(IncrementImpossible, match=r"has snapshots \(s1\)"):
        take(vm, parent)
    truth = vm.copy_truth(tmp_path / "1")
    _, full = take(vm)
    assert "no increment can follow" in caplog.text
    same([full], truth)
    snapshot.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
    with pytest.raises(IncrementImpossible, match="snapshot of somebody else"):
        take(vm, parent)
    assert overlays(vm) == files
    # They take their snapshot away again, and the chain goes on.
    vm.io("vda", "write -P 2 2M 1M")
    truth = vm.copy_truth(tmp_path / "2")
    vm.domain.blockCommit("vda", str(files[0]), None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)

    def pivots() -> bool:
        try:
            vm.domain.blockJobAbort("vda", libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
        except libvirt.libvirtError as error:
            # A job at its end need not be ready yet (seen with libvirt 11.3 and QEMU 10).
            if error.get_error_code() != libvirt.VIR_ERR_BLOCK_COPY_ACTIVE:
                raise
            return False
        return True

    wait_for(pivots, "the commit has caught up", 60)
    wait_for(lambda: not vm.domain.blockJobInfo("vda", 0), "the commit has ended", 60)
    _, above = take(vm, parent)
    same([layer, above], truth)
    vm.domain.checkpointCreateXML("<domaincheckpoint><name>theirs</name></domaincheckpoint>", 0)
    with pytest.raises(IncrementImpossible, match=r"checkpoints of somebody else \(theirs\)"):
        take(vm, parent)
    assert vm.checkpoints() == {"theirs"}


def test_a_backing_file_of_unknown_format_rules_overlays_out(lab, take, caplog):
    vm = lab.vm(["qcow2:16"], start=False)
    top, base = vm.disk("vda"), vm.folder / "template"
    top.rename(base)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, top], check=True)
    # Older QEMUs made images that do not say it: without its header extension this is one.
    top.write_bytes(top.read_bytes().replace(b"\xe2\x79\x2a\xca", b"\xe2\x79\x2a\xcb", 1))
    # libvirt lets a VM start on such a chain only where the definition tells the format.
    below = f"<backingStore type='file'><format type='qcow2'/><source file='{base}'/></backingStore>"
    vm.change(("<target dev='vda'", f"{below}<target dev='vda'"))
    vm.start()
    take(vm)
    assert f"does not say which format its backing file {base} has" in caplog.text
    assert overlays(vm) == []


def test_an_image_that_keeps_its_data_elsewhere_rules_overlays_out(lab, take, caplog):
    vm = lab.vm(["qcow2:16"], start=False)
    disk, data = vm.disk("vda"), vm.folder / "data"
    options = ["-o", f"data_file={data}"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, disk, "16M"], check=True)
    data.chmod(0o666)
    vm.start()
    take(vm)
    assert f"{disk} keeps its data in another file" in caplog.text
    assert overlays(vm) == []


@pytest.mark.parametrize("on", [True, False], ids=["live", "off"])
def test_a_disk_that_is_a_part_of_its_file_rules_overlays_out(lab, take, caplog, on):
    """An overlay lies on the whole file, as what is read through it and merged from it would."""
    vm = lab.vm(["raw:8"], start=False)
    source = f"<source file='{vm.folder}/vda.raw'/>"
    piece = "<slices><slice type='storage' offset='1048576' size='4194304'/></slices>"
    vm.change((source, f"<source file='{vm.folder}/vda.raw'>{piece}</source>"))
    if on:
        vm.start()
    taken, _ = take(vm)
    assert [disk.virtual_size for disk in taken.prepared.disks] == [4 * MiB]
    assert "disk vda is not simply its file" in caplog.text
    assert overlays(vm) == []


def test_files_that_qemu_has_open_and_libvirt_does_not_know(lab, take):
    """As after a kill of libvirtd between what QEMU does and libvirt writes down."""
    vm = lab.vm(["raw:16"])
    parent, _ = take(vm)
    vm.io("vda", "write -P 1 1M 1M")
    astray = vm.folder / f"vda.raw.backupcore-{'0' * 32}-vda.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", astray, "16M"], check=True)
    astray.chmod(0o666)
    vm.monitor("blockdev-add", **{"driver": "file", "node-name": "astray", "filename": str(astray)})
    files = overlays(vm)
    with pytest.raises(HypervisorError, match=f"it is not clear what disk vda lies on.*QEMU has {astray} open"):
        take(vm, parent)
    assert overlays(vm) == files
    vm.monitor("blockdev-del", **{"node-name": "astray"})
    take(vm, parent)
    assert len(overlays(vm)) == 1, "the one that held nothing went"


def test_an_overlay_that_another_vm_names_stays(lab, runs, take):
    vm, thief = lab.vm(["raw:16"]), lab.vm(["qcow2:16"], start=False)
    parent, _ = take(vm)
    vm.io("vda", "write -P 1 1M 1M")
    used = source(vm, "vda")
    thief.change((str(thief.disk("vda")), used))
    with pytest.raises(HypervisorError, match=f"it is used by VM {thief.name}"):
        take(vm, parent)
    assert Path(used).exists()
    vm.io("vda", "read -P 1 1M 1M")


def test_the_files_of_a_saved_vm_stay_as_its_saved_memory_names_them(lab, runs, take, same, tmp_path):
    vm = lab.vm(["raw:16"])
    parent, layer = take(vm)
    vm.io("vda", "write -P 1 1M 1M")
    truth = vm.copy_truth(tmp_path / "1")
    run = runs.run(vm, parent, settings=SNAPSHOT)
    with pytest.raises(Busy, match="its memory is saved"), runs.take(run) as taken:
        above = runs.keep(taken, tmp_path / "above")
        vm.domain.managedSave()
    assert len(overlays(vm)) == 2
    vm.start()
    vm.io("vda", "read -P 1 1M 1M", "write -P 2 2M 1M")
    same([layer, above], truth)
    truth = vm.copy_truth(tmp_path / "2")
    _, last = take(vm, taken)
    same([layer, above, last], truth)
    assert len(overlays(vm)) == 1


def test_disks_whose_size_is_no_multiple_of_a_sector(lab, take, same, tmp_path):
    for on in (True, False):
        vm = lab.vm(["raw:1"], start=False)
        disk = vm.disk("vda")
        disk.write_bytes(b"\x11" * (MiB + 100))
        if on:
            vm.start()
        truth = vm.copy_truth(tmp_path / f"0{on}") if on else vm.copy_disks(tmp_path / f"0{on}")
        parent, layer = take(vm)
        same([layer], truth)
        if on:
            vm.io("vda", f"write -P 2 {MiB} 512")
        else:
            command = ["qemu-io", "-f", "qcow2", "-c", f"write -P 2 {MiB} 512", source(vm, "vda")]
            subprocess.run(command, check=True, capture_output=True)
        truth = vm.copy_truth(tmp_path / f"1{on}") if on else vm.copy_disks(tmp_path / f"1{on}")
        assert truth["vda"].read_bytes()[MiB:] == b"\x02" * 512
        _, above = take(vm, parent)
        same([layer, above], truth)


def test_vms_that_can_have_no_overlays(lab, runs, take, caplog):
    vm = lab.vm(["qcow2:16"])
    parent, _ = take(vm)
    vm.domain.managedSave()
    with pytest.raises(IncrementImpossible, match="memory is saved"):
        take(vm, parent)
    vm.domain.managedSaveRemove()
    definition = vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    vm.domain.undefine()
    transient = vm.connection.createXML(definition)
    try:
        with pytest.raises(IncrementImpossible, match="transient"):
            take(vm, parent)
    finally:
        transient.destroy()
    vm.domain = vm.connection.defineXML(definition)


@pytest.mark.parametrize("on", [True, False], ids=["live", "off"])
def test_forget_brings_a_vm_back_to_its_plain_disks(lab, take, hypervisor, on):
    vm = lab.vm(["raw:16"], start=on)
    parent, _ = take(vm)
    if on:
        vm.io("vda", "write -P 1 1M 1M")
    used = source(vm, "vda")
    assert hypervisor.forget(vm.identity) == [used]
    assert source(vm, "vda") == str(vm.folder / "vda.raw")
    assert overlays(vm) == []
    assert not list(hypervisor.scratch.iterdir())
    if on:
        vm.io("vda", "read -P 1 1M 1M")
    with pytest.raises(IncrementImpossible):
        take(vm, parent)


def test_what_a_run_would_take_is_told_without_touching_anything(lab, runs, take, hypervisor):
    vm = lab.vm(["raw:16", "qcow2:16"])
    vm.io("vda", "write -P 1 0 8M")
    estimate = hypervisor.estimate(runs.run(vm, settings=SNAPSHOT))
    assert [(disk.id, disk.whole) for disk in estimate.disks] == [("vda", True), ("vdb", True)]
    assert overlays(vm) == []
    parent, _ = take(vm)
    vm.io("vda", "write -P 1 0 2M")
    vm.flush("vda")
    before = overlays(vm)
    estimate = hypervisor.estimate(runs.run(vm, parent, settings=SNAPSHOT))
    assert [disk.whole for disk in estimate.disks] == [False, False]
    assert 2 * MiB <= estimate.disks[0].bytes < 4 * MiB
    assert overlays(vm) == before
    assert not list(hypervisor.scratch.glob("*"))


def test_no_room_beside_a_disk(lab, runs, tmpfs, take):
    folder = tmpfs(40)
    vm = lab.vm(["raw:16"], start=False)
    disk = folder / "vda.raw"
    disk.write_bytes(bytes(34 * MiB))
    vm.change((str(vm.disk("vda")), str(disk)))
    with pytest.raises(TargetFull, match="MiB are free beside"):
        take(vm)
    assert list(folder.iterdir()) == [disk]


@pytest.mark.parametrize("running", [True, False])
def test_an_overlay_below_a_linked_clone_stays(running, lab, runs, tmp_path):
    """Made on the file that the VM uses at the moment: only the clone's own header tells of it."""
    vm, other = lab.vm(["qcow2:8"], start=False), lab.vm(["qcow2:8"], start=False)
    with runs.take(runs.run(vm, settings=SNAPSHOT)) as parent:
        pass
    overlay, clone = vm.disk("vda"), other.disk("vda")
    vm.write("vda", "write -P 0x44 0 1M")
    clone.unlink()
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(overlay), str(clone)]
    subprocess.run(command, check=True)
    if running:
        vm.start()
    truth = other.copy(tmp_path / "clone")
    told = pytest.raises(HypervisorError, match=f"{overlay.name} of VM .* stays: it is used by VM {other.name}")
    with told as error, runs.take(runs.run(vm, parent, settings=SNAPSHOT)):
        pass
    assert "qemu-img convert" in error.value.hint
    assert overlay.exists()
    assert same_bytes(other.copy(tmp_path / "clone2")["vda"], truth["vda"])
    # Nor is anything merged into it.
    with pytest.raises(HypervisorError, match="it is used by VM"):
        runs.hypervisor.forget(vm.identity)
    clone.unlink()
    assert len(runs.hypervisor.forget(vm.identity)) == 2
    assert vm.disk("vda").name == "vda.qcow2"
