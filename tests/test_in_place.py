"""``vmkeep restore --in-place`` and ``--define`` with real VMs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import libvirt
import pytest

from backupcore_libvirt.overlay.stack import overlay_path
from backupcore_libvirt.premade.image import make_overlay
from lab import kernel
from lab.domain_xml import DiskSpec
from lab.host import Host, size_of, stopped, wait_until
from lab.loop import loop_device
from lab.vm import VM, same

MIB = 1 << 20
pytestmark = pytest.mark.timeout(600)  # several restores each; on a loaded machine they take their time


@pytest.fixture
def host(make_vm, libvirt_uri: str, vm_folder: Path) -> Host:
    vm = make_vm(
        [DiskSpec(target="vda", size=32 * MIB), DiskSpec(target="vdb", size=16 * MIB + 512, format="raw")],
        label="place",
        devices="<interface type='user'><mac address='52:54:00:aa:bb:cc'/></interface>"
        "<graphics type='vnc' port='5999' listen='127.0.0.1'/>",
    )
    vm.io("vda", "write -P 0x55 1M 8M")
    vm.io("vdb", "write -P 0x11 0 2M")
    return Host(vm_folder, vm, libvirt_uri, driver="lab")


def contents(host: Host) -> dict[str, Path]:
    return host.note_truth(f"now-{os.urandom(4).hex()}")


def equal(first: dict[str, Path], second: dict[str, Path]) -> bool:
    return all(size_of(first[disk]) == size_of(second[disk]) and same(first[disk], second[disk]) for disk in first)


def files(host: Host) -> set[str]:
    return {path.name for path in host.vm.folder.iterdir() if not path.name.endswith(".log")}


def test_disks_are_replaced_and_a_new_image_says_why(host: Host):
    truth = host.note_truth("first")
    taken = host.backup()
    host.vm.io("vda", "write -P 0x66 0 16M")
    host.vm.io("vdb", "write -P 0x77 0 16M")
    refused = host.run("restore", "1", "--in-place")
    assert (refused.code, refused.err.splitlines()[0]) == (
        10,
        f"vmkeep: VM {host.vm.name} is running; its disks cannot be replaced",
    )
    host.vm.destroy()
    later = contents(host)
    before = files(host)
    disk = host.vm.disk("vda")
    disk.chmod(0o640)
    done = host.ask("restore", "1", "--in-place")
    assert equal(contents(host), truth)
    assert (done["vm"], done["image"], done["increment"]) == (host.vm.name, 1, taken["increment"])
    kept = {one["id"]: Path(one["kept"]) for one in done["disks"]}
    assert files(host) == before | {path.name for path in kept.values()}
    assert kept["vda"].name.startswith("vda.qcow2.before-restore-")
    assert equal(later, kept)
    assert (disk.stat().st_mode & 0o777, disk.stat().st_uid) == (0o640, kept["vda"].stat().st_uid)
    info = subprocess.run(["qemu-img", "info", str(host.vm.disk("vdb"))], capture_output=True, text=True, check=True)
    assert "file format: raw" in info.stdout
    assert not host.vm.domain.listAllCheckpoints(), "they belonged to the old disks"
    host.vm.start()
    again = host.backup()
    assert (again["type"], again["image"]) == ("FULL", 2)
    assert again["reason"].startswith("disks vda, vdb restored in place from image 1, increment 0, on 2")
    assert host.differing(2, 0, truth) == []
    assert host.run("recover", host.vm.name).out == "nothing to put right\n"


def test_one_disk_is_replaced_and_the_old_one_dropped(host: Host):
    truth = host.note_truth("first")
    host.backup()
    host.vm.io("vda", "write -P 0x66 0 16M")
    host.vm.io("vdb", "write -P 0x77 0 16M")
    host.vm.destroy()
    later = contents(host)
    before = files(host)
    done = host.run("restore", "1", "--in-place", "--disk", "vda", "--drop-old")
    assert done.code == 0, done.err
    assert files(host) == before
    assert equal(contents(host), {"vda": truth["vda"], "vdb": later["vdb"]})


def test_a_disk_that_was_lost_comes_back(host: Host):
    truth = host.note_truth("first")
    host.backup()
    host.vm.destroy()
    host.vm.disk("vda").unlink()
    (done,) = [one for one in host.ask("restore", "1", "--in-place")["disks"] if one["id"] == "vda"]
    assert done["kept"] is None
    assert equal(contents(host), truth)
    host.vm.start()


def test_what_is_refused(host: Host):
    host.backup()
    host.vm.domain.managedSave()
    wait_until(lambda: not host.vm.active, "the VM to be saved")
    before = files(host)

    def refused(code: int, words: str, *more: str) -> None:
        done = host.run("restore", "1", "--in-place", *more)
        assert (done.code, words in done.err) == (code, True), done.err
        assert files(host) == before

    refused(10, "saved memory image")
    host.vm.domain.managedSaveRemove()
    refused(4, "holds no disk vdz", "--disk", "vdz")
    refused(2, "--to cannot go with --in-place", "--to", "/nowhere")
    # Snapshots of which libvirt knows nothing, as after the VM was undefined and defined anew.
    subprocess.run(["qemu-img", "snapshot", "-c", "dear", str(host.vm.disk("vda"))], check=True)
    before = files(host)
    refused(9, "holds 1 snapshot in its image")
    subprocess.run(["qemu-img", "snapshot", "-d", "dear", str(host.vm.disk("vda"))], check=True)
    before = files(host)
    # Somebody else's hold on a disk: QEMU's own lock.
    holder = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(host.vm.disk("vda"))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write(b"read 0 512\n")
        holder.stdin.flush()
        holder.stdout.readline()
        refused(10, "is in use by another program")
    finally:
        holder.communicate(b"quit\n")
    # Another VM whose disk lies on top of this one's.
    overlay = host.vm.folder / "overlay.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(host.vm.disk("vda")), str(overlay)]
    subprocess.run(command, check=True)
    before = files(host)
    other = host.vm.connection.defineXML(
        f"<domain type='qemu'><name>{host.vm.name}-other</name><memory unit='MiB'>16</memory>"
        "<os><type arch='x86_64'>hvm</type></os><devices><disk type='file' device='disk'>"
        f"<driver name='qemu' type='qcow2'/><source file='{overlay}'/><target dev='vda' bus='virtio'/></disk>"
        "</devices></domain>"
    )
    try:
        refused(9, f"is also used by VM {host.vm.name}-other")
    finally:
        other.undefine()
    # A block device.
    xml = host.vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    block = xml.replace("<disk type='file'", "<disk type='block'").replace("source file=", "source dev=")
    host.vm.connection.defineXML(block)
    refused(9, "is a block disk")
    refused(9, "vmkeep restore ID --disk vdb --device /", "--disk", "vdb")
    refused(9, "qemu-img convert -O FORMAT FILE TARGET", "--disk", "vda")
    host.vm.connection.defineXML(xml)
    host.vm.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
    refused(4, "is not on this host")
    host.vm.connection.defineXML(xml)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param("vmkeep.in_place:_ready return", marks=pytest.mark.soak),
        "vmkeep.swap:_put return",
        pytest.param("vmkeep.swap:carry_out return", marks=pytest.mark.soak),
    ],
    ids=["before", "between", "after"],
)
def test_a_vm_that_is_started_while_its_disks_are_swapped_never_runs_on_old_ones(host: Host, step: str):
    """On old and new ones mixed, or on old ones that have lost their names, what it writes would be lost."""
    truth = host.note_truth("first")
    host.backup()
    host.vm.io("vda", "write -P 0x66 0 16M")
    host.vm.destroy()
    process = host.start("restore", "1", "--in-place", "--drop-old", at=step, stop=True)
    try:
        wait_until(partial(stopped, process.pid), step)
        if step.endswith("carry_out return"):
            host.vm.start()
            host.vm.destroy()
        else:
            with pytest.raises(
                libvirt.libvirtError,
                match='Failed to get "write" lock|failed to connect to monitor|No such file or directory',
            ):
                host.vm.start()
    finally:
        process.send_signal(signal.SIGCONT)
    done = host.end(process)
    assert done.code == 0, done.err
    host.vm.start()
    assert equal(contents(host), truth)


def test_a_vm_that_is_started_just_before_the_swap_keeps_its_disks(host: Host):
    host.backup()
    host.vm.destroy()
    before = files(host)
    process = host.start("restore", "1", "--in-place", at="backupcore_libvirt.image_lock:keep_closed call", stop=True)
    try:
        wait_until(partial(stopped, process.pid), "the moment before the swap")
        host.vm.start()
    finally:
        process.send_signal(signal.SIGCONT)
    done = host.end(process)
    assert (done.code, "is open in another process" in done.err) == (10, True), done.err
    assert files(host) == before
    host.vm.io("vda", "write -P 0x66 0 1M")


KILLED = {
    # The step, how often it is let pass, and whether the VM has its new disks afterwards.
    "half a disk is written": ("backupcore.disk.writer:DiskWriter.write call", 0, False),
    "the disks are being checked": ("backupcore_libvirt.in_place:fit call", 1, False),
    "the journal says ready": ("vmkeep.swap:write return", 1, False),
    "the chain is closed": ("vmkeep.catalog.images:close return", 0, True),
    "one disk is away": ("vmkeep.swap:_take_away return", 0, True),
    "one disk is swapped": ("vmkeep.swap:_put return", 0, True),
    "all disks are swapped": ("vmkeep.swap:carry_out return", 0, True),
}


def scribble(host: Host, number: int) -> None:
    """Change the disks of the powered-off VM."""
    for disk, shape in (("vda", "qcow2"), ("vdb", "raw")):
        command = ["qemu-io", "-f", shape, "-c", f"write -P {number + 100} 0 9M", str(host.vm.disk(disk))]
        subprocess.run(command, check=True, capture_output=True)


QUICK = ("half a disk is written", "one disk is swapped")


@pytest.mark.parametrize("names", [QUICK, pytest.param(tuple(KILLED), marks=pytest.mark.soak)], ids=["some", "all"])
def test_killed_on_the_way_the_vm_has_all_old_or_all_new_disks(host: Host, names: tuple[str, ...]):
    truth = host.note_truth("first")
    host.backup()
    host.vm.destroy()
    closed = False
    for number, name in enumerate(names):
        step, passes, swapped = KILLED[name]
        scribble(host, number)
        later = contents(host)
        killed = host.run("restore", "1", "--in-place", at=step, LAB_PASS=str(passes))
        assert killed.code == -signal.SIGKILL, f"{name}: {killed.err}"
        (told,) = host.ask("recover", host.vm.name)
        assert told["errors"] == [], name
        assert equal(contents(host), truth if swapped else later), name
        assert not [path for path in files(host) if path.startswith(".")], name
        assert host.run("recover", host.vm.name).out == "nothing to put right\n", name
        closed = closed or swapped
        assert {one.state for one in host.recorded()} == {"closed" if closed else "open"}, name
    host.vm.start()
    host.vm.io("vda", "write -P 0x11 20M 1M")
    after = host.note_truth("after")
    taken = host.backup()
    assert (taken["type"], "restored in place" in taken["reason"]) == ("FULL", True)
    assert host.differing(taken["image"], taken["increment"], after) == []


@pytest.mark.parametrize(
    "step", [0, pytest.param(1, marks=pytest.mark.soak), pytest.param(2, marks=pytest.mark.soak), 3]
)
def test_after_a_power_cut_the_vm_starts_on_no_mix_of_disks(host: Host, step: int):
    """The journal lies there, nobody holds a lock, and libvirt starts the VM before anything of ours runs."""
    truth = host.note_truth("first")
    host.backup()
    host.vm.destroy()
    scribble(host, 1)
    at, passes = ("vmkeep.swap:_rename call", 0) if step == 0 else ("vmkeep.swap:_rename return", step - 1)
    later = contents(host)
    killed = host.run("restore", "1", "--in-place", at=at, LAB_PASS=str(passes))
    assert killed.code == -signal.SIGKILL, killed.err
    if step == 0:
        assert equal(contents(host), later)
        host.vm.start()
        host.vm.destroy()
    elif step == 3:
        assert equal(contents(host), truth)
        host.vm.start()
        host.vm.destroy()
    else:
        with pytest.raises(libvirt.libvirtError, match="No such file or directory"):
            host.vm.start()
    listed = host.run("vm", "list").out
    assert "a restore in place (image 1, increment 0) is under way, or was cut off" in listed
    assert ("it lacks the file of disk vda, so it cannot start" in listed) is (step in (1, 2))
    (told,) = host.ask("recover", host.vm.name)
    assert told["errors"] == []
    assert equal(contents(host), later if step == 0 else truth)
    assert "restore in place" not in host.run("vm", "list").out
    host.vm.start()


@pytest.fixture
def made(host: Host) -> Iterator[list[str]]:
    """Names of VMs that a test defines; they are removed."""
    names: list[str] = []
    yield names
    for name in names:
        domain = host.vm.connection.lookupByName(name)
        if domain.isActive():
            domain.destroy()
        domain.undefine()


def test_a_restored_vm_is_defined_with_a_new_identity_and_boots(host: Host, made: list[str]):
    truth = host.note_truth("first")
    host.backup()
    name = f"{host.vm.name}-back"
    made.append(name)
    to = host.folder / "back"
    to.mkdir()
    shutil.chown(to, host.folder.stat().st_uid, host.folder.stat().st_gid)
    done = host.ask("restore", "1", "--to", str(to), "--name", name, "--define")
    domain = host.vm.connection.lookupByName(name)
    assert done["uuid"] == domain.UUIDString() != host.vm.uuid
    definition = ElementTree.fromstring(domain.XMLDesc())
    mac = definition.find("devices/interface/mac")
    assert mac is not None
    assert mac.get("address") != "52:54:00:aa:bb:cc"
    assert {"uuid", "devices/interface/mac", "devices/graphics/@port"} <= set(done["left_out"])
    assert not any("devices/disk/alias" in line for line in done["left_out"]), "a guest may know a disk by it"
    domain.create()
    assert domain.isActive()
    back = VM(libvirt.open(host.uri), domain, to)
    assert equal(back.copy_truth(host.folder / "back-truth"), truth)
    back.connection.close()
    taken = host.run("restore", "1", "--to", str(host.folder / "third"), "--name", name, "--define")
    assert (taken.code, f"there is a VM {name} already" in taken.err) == (2, True)
    assert not (host.folder / "third").exists(), "found before anything was fetched"
    same_uuid = host.run("restore", "1", "--to", str(to), "--name", f"{name}2", "--define", "--keep-uuid")
    assert (same_uuid.code, "which is still there" in same_uuid.err) == (2, True)


def test_identity_is_kept_where_asked_for(host: Host, made: list[str]):
    host.backup()
    host.vm.destroy()
    uuid = host.vm.uuid
    xml = host.vm.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    host.vm.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
    name = f"{host.vm.name}-moved"
    to = host.folder / "back"
    done = host.ask("restore", "1", "--to", str(to), "--name", name, "--define", "--keep-uuid", "--keep-mac")
    domain = host.vm.connection.lookupByName(name)
    assert done["uuid"] == uuid == domain.UUIDString()
    assert "52:54:00:aa:bb:cc" in domain.XMLDesc()
    domain.undefine()
    host.vm.connection.defineXML(xml)
    closed = host.folder / "closed"
    closed.mkdir(mode=0o700)
    refused = host.run("restore", "1", "--to", str(closed), "--name", name, "--define")
    assert (refused.code, f"cannot pass {closed}" in refused.err) == (7, True), refused.err
    assert not list(closed.iterdir())


@pytest.fixture
def uefi(make_vm, libvirt_uri: str, vm_folder: Path) -> Host:
    firmware = kernel.firmware()
    vm = make_vm([DiskSpec(target="vda", size=8 * MIB)], label="uefi", firmware=firmware)
    vm.destroy()
    return Host(vm_folder, vm, libvirt_uri, driver="lab")


def test_the_variables_of_the_firmware_come_back_with_all_disks(uefi: Host):
    variables = uefi.vm.folder / "nvram.fd"
    truth, first = uefi.note_truth("first"), variables.read_bytes()
    uefi.backup()
    later = first[:1000] + b"changed since" + first[1013:]
    variables.write_bytes(later)
    variables.chmod(0o640)
    owner = variables.stat().st_uid
    uefi.ask("restore", "1", "--in-place", "--disk", "vda", "--drop-old")
    assert variables.read_bytes() == later, "with one disk they stay"
    done = uefi.ask("restore", "1", "--in-place")
    assert variables.read_bytes() == first
    assert (variables.stat().st_mode & 0o777, variables.stat().st_uid) == (0o640, owner)
    assert done["nvram"]["path"] == str(variables)
    assert Path(done["nvram"]["kept"]).read_bytes() == later
    assert [one["id"] for one in done["disks"]] == ["vda"]
    assert equal(contents(uefi), truth)
    assert not [name for name in files(uefi) if name.startswith(".")]
    # Cut off between the disk and the variables, `recover` brings both to their end.
    variables.write_bytes(later)
    killed = uefi.run("restore", "1", "--in-place", at="vmkeep.swap:_put return")
    assert killed.code == -signal.SIGKILL, killed.err
    (told,) = uefi.ask("recover", uefi.vm.name)
    assert told["errors"] == []
    assert variables.read_bytes() == first
    uefi.vm.start()


@pytest.fixture
def tpm(make_vm, libvirt_uri: str, vm_folder: Path) -> Iterator[tuple[Host, Path]]:
    """A host whose VM has a TPM that was used, and the file of its state."""
    device = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
    vm = make_vm([DiskSpec(target="vda", size=4 * MIB)], label="tpm", devices=device)
    vm.destroy()
    state = Path(f"/var/lib/libvirt/swtpm/{vm.uuid}/tpm2/tpm2-00.permall")
    state.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    state.write_bytes(b"keys")
    yield Host(vm_folder, vm, libvirt_uri, driver="lab"), state
    shutil.rmtree(state.parents[1])


@pytest.mark.skipif(os.geteuid() != 0, reason="that folder is root's")
def test_the_state_of_the_tpm_comes_back_with_all_disks(tpm: tuple[Host, Path]):
    host, state = tpm
    host.backup()
    state.write_bytes(b"other keys")
    state.chmod(0o640)
    host.ask("restore", "1", "--in-place", "--disk", "vda")
    assert state.read_bytes() == b"other keys", "with one disk it stays"
    # Cut off while the disk has lost its name, `recover` brings both to their end.
    killed = host.run("restore", "1", "--in-place", at="vmkeep.swap:_put return")
    assert killed.code == -signal.SIGKILL, killed.err
    assert not (host.vm.folder / "vda.qcow2").exists()
    assert state.read_bytes() == b"keys"
    (told,) = host.ask("recover", host.vm.name)
    assert told["errors"] == []
    assert (host.vm.folder / "vda.qcow2").exists()
    assert state.read_bytes() == b"keys"
    assert state.stat().st_mode & 0o777 == 0o640
    done = host.ask("restore", "1", "--in-place")
    assert done["tpm"]["path"] == str(state)
    assert Path(done["tpm"]["kept"]).read_bytes() == b"keys"
    assert [one["id"] for one in done["disks"]] == ["vda"]


@pytest.fixture
def loop(vm_folder: Path) -> Iterator[Path]:
    """A block device of 16 MiB."""
    with loop_device(vm_folder / "loop", bytes(16 * MIB)) as made:
        yield made


def test_a_block_device_of_a_vm_is_written_to_only_when_told_so(make_vm, libvirt_uri: str, vm_folder: Path, loop: Path):
    device = (
        f"<disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='{loop}'/>"
        "<target dev='vdb' bus='virtio'/><alias name='ua-vdb'/></disk>"
    )
    host = Host(
        vm_folder,
        make_vm([DiskSpec(target="vda", size=4 * MIB)], label="block", devices=device),
        libvirt_uri,
        driver="lab",
    )
    host.vm.io("vdb", "write -P 0x55 1M 8M")
    host.backup()
    host.vm.io("vdb", "write -P 0x66 0 16M")
    command = ["restore", "1", "--disk", "vdb", "--device", str(loop)]

    def refused(code: int, words: str, *more: str) -> None:
        done = host.run(*command, *more)
        assert (done.code, words in done.err) == (code, True), done.err

    refused(10, "which is running", "--overwrite")
    host.vm.destroy()
    done = host.run("restore", "1", "--in-place")
    assert (done.code, f"vmkeep restore ID --disk vdb --device {loop} --overwrite" in done.err) == (9, True), done.err
    refused(10, f"is disk vdb of VM {host.vm.name}")
    process = host.start(*command, "--overwrite", at="backupcore.disk.raw:DeviceWriter._prepare return", stop=True)
    try:
        wait_until(partial(stopped, process.pid), "the device to be written")
        host.vm.start()
    finally:
        process.send_signal(signal.SIGCONT)
    done = host.end(process)
    assert (done.code, "was started while its disk" in done.err) == (10, True), done.err
    host.vm.destroy()
    assert host.run(*command, "--overwrite").code == 0
    assert loop.read_bytes() == bytes(MIB) + b"\x55" * 8 * MIB + bytes(7 * MIB)
    host.vm.start()
    host.vm.destroy()
    # A backup that was killed has left an overlay on it, and the guest's writes in that.
    folder = host.scratch / "overlays" / host.vm.uuid
    folder.mkdir(parents=True)
    overlay = overlay_path(str(loop), "0" * 32, "vdb", temporary=True, folder=folder)
    make_overlay(Path(overlay), 16 * MIB, str(loop), "raw")
    text = host.vm.domain.XMLDesc().replace(f"dev='{loop}'", f"file='{overlay}'")
    text = text.replace("type='block'", "type='file'").replace("type='raw'", "type='qcow2'")
    host.vm.connection.defineXML(text)
    refused(10, "writes to an overlay on it", "--overwrite")
