"""What a backup keeps beside the disks: firmware variables, the state of a TPM, kernel, initrd and device tree."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from backupcore.disk.in_memory import as_qcow2
from backupcore_libvirt.regular_file import Strange, open_file
from backupcore_libvirt.vm_files import LIMIT, VMFile, read, vm_files
from lab import kernel

TPM = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"


def small_artifacts(taken) -> dict[str, bytes]:
    return {a.name: a.open().read() for a in taken.prepared.artifacts if not a.name.startswith("disk.")}


def test_the_state_of_a_tpm_is_kept_and_can_be_given_to_another_vm(needs_root, lab, runs):
    vm = lab.vm(["qcow2:8"], more=TPM)
    state = Path(f"/var/lib/libvirt/swtpm/{vm.uuid}/tpm2/tpm2-00.permall")
    with runs.take(runs.run(vm)) as taken:
        kept = small_artifacts(taken)["tpm"]
        assert kept == state.read_bytes()
        assert taken.prepared.left_out == ()

    other = lab.vm(["qcow2:8"], more=TPM)
    target = Path(f"/var/lib/libvirt/swtpm/{other.uuid}/tpm2/tpm2-00.permall")

    def differing() -> int:
        found = target.read_bytes()  # of nearly the same length: its keys have a byte more or less
        return sum(a != b for a, b in zip(found, kept, strict=False)) + abs(len(found) - len(kept))

    own = differing()
    assert own > 100, "its own seeds"
    other.destroy()
    file = lab.folder / "restored-tpm"
    file.write_bytes(kept)
    subprocess.run(["install", "-D", "-m", "600", file, target], check=True)  # as the output of a restore says
    other.start()
    with runs.take(runs.run(other)):
        # libtpms of Debian 13 writes more of its own than a count: 69 bytes differed there, some 10 on Debian 12.
        assert differing() < own // 10, (
            f"the emulator took it ({own} bytes would differ), and counts its own starts in it"
        )


@pytest.fixture
def booting(lab, libvirt_uri):
    """A VM that boots from files of the host."""
    files = {}
    for name in ("kernel", "initrd"):
        files[name] = lab.folder / name
    built = kernel.files()
    shutil.copy(built.image, files["kernel"])
    shutil.copy(built.initramfs, files["initrd"])
    vm = lab.vm(["qcow2:8"], start=False)
    direct = f"<kernel>{files['kernel']}</kernel><initrd>{files['initrd']}</initrd><cmdline>quiet a,b</cmdline>"
    vm.change(("<boot dev='hd'/>", direct), (">65536<", ">196608<"))  # a kernel needs more memory
    vm.start()
    return vm, files


def test_kernel_and_initrd_are_kept_and_named_by_the_restored_definition(booting, runs, hypervisor, lab):
    vm, files = booting
    with runs.take(runs.run(vm)) as taken:
        kept = small_artifacts(taken)
        assert {name: kept[name] for name in files} == {name: path.read_bytes() for name, path in files.items()}
    boot = {name: lab.folder / f"restored-{name}" for name in files}
    options = {"name": "again", "disks": {"vda": lab.folder / "vda"}, "nvram": None, "no_ip": False, "no_nic": False}
    made = ElementTree.fromstring(hypervisor.definition(kept["vm.xml"], **options, boot=boot).xml)
    assert {name: made.findtext(f"os/{name}") for name in ("kernel", "initrd", "cmdline", "dtb")} == {
        "kernel": str(boot["kernel"]),
        "initrd": str(boot["initrd"]),
        "cmdline": "quiet a,b",
        "dtb": None,
    }
    none = ElementTree.fromstring(hypervisor.definition(kept["vm.xml"], **options).xml)
    assert [none.find(f"os/{name}") for name in ("kernel", "initrd", "cmdline")] == [None, None, None]


def test_files_that_cannot_be_kept_are_named_with_the_reason(booting, runs):
    vm, files = booting
    with files["initrd"].open("ab") as file:
        file.truncate(LIMIT + (1 << 20))
    files["kernel"].unlink()
    with runs.take(runs.run(vm)) as taken:
        assert set(small_artifacts(taken)) == {"vm.xml"}
        assert {left.id: left.reason for left in taken.prepared.left_out} == {
            "kernel": f"{files['kernel']} is missing",
            "initrd": f"{files['initrd']} has 129 MiB; files of up to 128 MiB are kept",
        }
    assert taken.prepared.left_out == runs.hypervisor.estimate(runs.run(vm)).left_out


class Described:
    """A VM that is a definition and nothing else."""

    name = "described"
    uuid = "00000000-0000-0000-0000-000000000001"

    def __init__(self, xml: str, *, active: bool = True) -> None:
        self._xml = f"<domain>{xml}</domain>"
        self._active = active

    def live_xml(self) -> str:
        return self._xml

    inactive_xml = live_xml

    def is_active(self) -> bool:
        return self._active


@pytest.mark.parametrize(
    ("xml", "left_out"),
    [
        ("<os><nvram type='block'><source dev='/dev/vg/nvram'/></nvram></os>", ("nvram", "do not lie in a file")),
        ("<os><nvram format='vmdk'>/n</nvram></os>", ("nvram", "NVRAM /n has the format vmdk")),
        ("<devices><tpm><backend type='passthrough'/></tpm></devices>", ("tpm", "(passthrough)")),
        ("<devices><tpm><backend type='external'/></tpm></devices>", ("tpm", "(external)")),
        (
            "<devices><tpm><backend type='emulator'><source type='dir' path='/t'/></backend></tpm></devices>",
            ("tpm", "a place of its own"),
        ),
        (
            "<devices><tpm><backend type='emulator' version='2.0'/></tpm></devices>",
            ("tpm", "tpm2-00.permall is missing"),
        ),
        ("<os><kernel>/bin/sh</kernel></os>", None),
        ("<os><initrd>/proc</initrd></os>", ("initrd", "/proc is no regular file")),
    ],
)
def test_what_is_left_out_and_why(xml, left_out):
    _, found = vm_files(Described(xml), "qemu:///system")
    assert len(found) == (left_out is not None)
    if left_out:
        assert found[0].id == left_out[0]
        assert left_out[1] in found[0].reason


def test_nvram_and_tpm_that_are_away_are_told_and_hinder_nothing():
    """Of a VM that runs, and of one that is off; it may have been started never yet."""
    xml = "<os><nvram>/nowhere/nvram</nvram></os><devices><tpm><backend type='emulator' version='1.2'/></tpm></devices>"
    for active, then in ((True, "will be lost when the VM is powered off"), (False, "are made anew at the next start")):
        files, left = vm_files(Described(xml, active=active), "qemu:///session")
        assert (files, [(one.id, one.missed) for one in left]) == ((), [("nvram", True), ("tpm", True)])
        assert all("is missing: " in one.reason and then in one.reason for one in left)


def test_a_file_that_is_replaced_while_it_is_read(tmp_path):
    path = tmp_path / "nvram"
    contents = iter([b"a", None, b"b", b"c", b"c"])

    def next_contents(_seconds: float) -> None:
        found = next(contents)
        path.unlink(missing_ok=True)
        if found is not None:
            path.write_bytes(found)

    next_contents(0)
    file = VMFile("nvram", path)
    assert read(file, next_contents).data == b"c"
    changing = read(file, lambda _: path.write_bytes(path.read_bytes() + b"."))
    path.unlink()
    gone = read(file, lambda _: None)
    assert [(one.reason, one.missed) for one in (changing, gone)] == [
        (f"{path} kept changing while it was read", True),
        (f"{path} is missing", True),
    ]


def test_variables_in_a_qcow2_file_are_kept_raw(tmp_path, qemu_tools):
    held = bytes(range(256)) * 1024
    (tmp_path / "raw").write_bytes(held)
    path, above = tmp_path / "nvram.qcow2", tmp_path / "above.qcow2"
    path.write_bytes(as_qcow2(held))
    subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", tmp_path / "raw", path], check=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", path, above], check=True)
    xml = "<os><loader format='qcow2'>/l</loader><nvram>{}</nvram></os>"
    (file,), left_out = vm_files(Described(xml.format(path)), "qemu:///system")
    assert (file, left_out) == (VMFile("nvram", path, "qcow2"), ())
    again = read(file, lambda _: None).data == held
    assert again, "bytes, of which pytest would make a very long text"
    files, (left,) = vm_files(Described(xml.format(above)), "qemu:///system")
    assert (files, left.missed, left.reason) == ((), True, f"{above} lies on another file")


@pytest.mark.timeout(20)
def test_a_fifo_in_place_of_a_file_is_left_out(tmp_path):
    path = tmp_path / "nvram"
    os.mkfifo(path)
    files, (left,) = vm_files(Described(f"<os><nvram>{path}</nvram></os>"), "qemu:///system")
    assert (files, left.missed, left.reason) == ((), True, f"{path} is no regular file")


def test_a_link_that_another_user_has_made_is_not_followed(tmp_path):
    """The folders of NVRAM and TPM state belong to the users of QEMU and swtpm, which a guest may have taken over."""
    if os.geteuid():
        pytest.skip("only root can give a link to another user")
    secret, path = tmp_path / "secret", tmp_path / "nvram"
    secret.write_bytes(b"the host's")
    path.symlink_to(secret)
    described = Described(f"<os><nvram>{path}</nvram></os>")
    (file,), _ = vm_files(described, "qemu:///system")
    assert read(file, lambda _: None).data == b"the host's", "root may put it elsewhere"
    os.chown(path, 1234, 1234, follow_symlinks=False)
    assert read(file, lambda _: None).missed
    files, (left,) = vm_files(described, "qemu:///system")
    assert (files, left.missed) == ((), True)
    assert left.reason == f"{path} is reached by a link that user 1234 has made ({path})"


def test_a_folder_that_becomes_a_link_meanwhile_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "host").mkdir()
    (tmp_path / "host/state").write_bytes(b"the host's")
    (tmp_path / "vm").symlink_to(tmp_path / "host")
    monkeypatch.setattr("backupcore_libvirt.regular_file._real", str)
    with pytest.raises(Strange, match="another file"):
        open_file(tmp_path / "vm/state")
