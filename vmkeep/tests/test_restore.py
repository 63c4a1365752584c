"""``vmkeep restore``: the bytes, the names, and that nothing is ever overwritten."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kept_in_files import WEB, load, save

from backupcore.errors import Busy
from backupcore.hypervisor import VMDisk, VMState
from vmkeep import config, restore_elsewhere
from vmkeep.naming import file_name, short
from vmkeep.workplace import Workplace


def raw(path: Path) -> bytes:
    converted = path.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(path), str(converted)], check=True)
    return converted.read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def two_increments(site):
    truths, sources = [], []
    for number in range(2):
        site.write(WEB, "vda", number << 20, f"increment {number}".encode())
        sources.append(site.run("backup", "web1", "--json").json["source"])
        truths.append({disk: bytes(data) for disk, data in site.guest(WEB).disks.items()})
    return truths, sources


@pytest.fixture
def chain(site, once):
    """Two increments: what the disks held at each, and their sources."""
    return once(site, two_increments)


def test_every_increment_comes_back_as_it_was(site, chain):
    truths, sources = chain
    for number in (1, 0):
        to = site.folder / f"to{number}"
        made = site.run("restore", "1", "--increment", str(number), "--to", str(to), "--json").json
        base = f"web1-{sources[number][:8]}"
        assert made["name"] == base
        assert made["xml"] == str(to / f"{base}.xml")
        assert made["increment"] == number
        assert sorted(file.name for file in to.iterdir()) == sorted(
            [f"{base}.xml", f"{base}-disk-vda.qcow2", f"{base}-disk-vdb.qcow2"]
        )
        for disk in made["disks"]:
            assert raw(Path(disk["path"])) == truths[number][disk["id"]]
            assert disk["size"] == len(truths[number][disk["id"]])
        links = ",".join(f"{i}:{sources[i]}" for i in range(number + 1))
        assert made["disks"][0]["from"] == f"files://nas/{links}//disk.vda.qcow2"
    assert not list((site.state / "runs").iterdir())


def test_the_last_increment_in_the_current_folder_is_the_default(site, chain, monkeypatch):
    folder = site.folder / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    told = site.run("restore", "1", "--name", "copy")
    assert told.code == 0, told.err
    assert names(folder) == ["copy-disk-vda.qcow2", "copy-disk-vdb.qcow2", "copy.xml"]
    assert told.out.splitlines()[-1] == f"Look it through, then: virsh define {folder}/copy.xml"
    assert b"<name>copy</name>" in Path("copy.xml").read_bytes()


def test_files_that_the_vm_consists_of_besides_come_back_beside_its_disks(site):
    guests = load(site.guests)
    files = {"kernel": b"bzImage", "initrd": b"cpio", "dtb": b"tree", "tpm": b"seeds"}
    next(guest for guest in guests if guest.vm == WEB).files = files
    save(site.guests, guests)
    site.run("backup", "web1")
    told = site.run("restore", "1", "--to", str(site.folder / "to"), "--name", "copy")
    assert told.code == 0, told.err
    restored = {name: site.folder / "to" / f"copy-{name}" for name in files}
    assert {name: path.read_bytes() for name, path in restored.items()} == files
    assert f"{restored['tpm']}  (TPM state)" in told.out
    assert f"{restored['tpm']} /var/lib/libvirt/swtpm/$(virsh domuuid copy)/tpm2/tpm2-00.permall" in told.out
    definition = (site.folder / "to" / "copy.xml").read_text()
    assert f"<kernel>{restored['kernel']}</kernel>" in definition
    assert "swtpm" not in definition
    assert "copy-tpm" not in definition
    made = site.run("restore", "1", "--to", str(site.folder / "json"), "--name", "copy", "--json").json
    assert made["beside"] == [{"artifact": n, "path": str(site.folder / "json" / f"copy-{n}")} for n in files]
    one = site.run("restore", "1", "--to", str(site.folder / "one"), "--disk", "vda", "--json").json
    assert one["beside"] == [], "a disk without its VM"


def test_what_the_definition_lacks_is_told_by_what_it_does_to_the_guest(site, chain):
    told = site.run("restore", "1", "--to", str(site.folder / "to"), "--redact")
    assert told.code == 0, told.err
    assert "left out of the definition (loses a device): devices/hostdev\n" in told.out
    assert "cosmetic" not in told.out, "there is none"
    made = site.run("restore", "1", "--to", str(site.folder / "again"), "--json").json
    assert made["left_out"] == ["devices/hostdev"]
    assert made["left_out_effects"] == {"will_not_boot": [], "loses_a_device": ["devices/hostdev"], "cosmetic": []}
    refused = site.run("restore", "1", "--in-place", "--redact")
    assert (refused.code, "--redact cannot go with --in-place" in refused.err) == (2, True)


@pytest.mark.parametrize("existing", ["copy-disk-vdb.qcow2", "copy.xml", "copy-initrd"])
@pytest.mark.parametrize("dangling", [False, True])
def test_nothing_is_overwritten(site, chain, existing, dangling):
    to = site.folder / "to"
    to.mkdir()
    if dangling:
        (to / existing).symlink_to(site.folder / "nowhere")
    else:
        (to / existing).write_text("precious")
    told = site.run("restore", "1", "--to", str(to), "--name", "copy")
    assert told.code == 2
    assert f"{to / existing}: exists already" in told.err
    assert names(to) == [existing]
    assert not (site.folder / "nowhere").exists()


def test_one_disk_comes_without_a_definition(site, chain):
    to = site.folder / "to"
    made = site.run("restore", "1", "--disk", "vdb", "--to", str(to), "--name", "one", "--json").json
    assert made["xml"] is None
    assert names(to) == ["one-disk-vdb.qcow2"]
    told = site.run("restore", "1", "--disk", "vdx", "--to", str(to))
    assert (told.code, "holds no disk vdx" in told.err) == (4, True)


def test_damage_fails_and_leaves_nothing_behind(site, chain):
    _, sources = chain
    stored = site.store / sources[0] / "disk.vda.qcow2"
    content = bytearray(stored.read_bytes())
    content[-10] ^= 1
    stored.write_bytes(content)
    to = site.folder / "to"
    told = site.run("restore", "1", "--to", str(to), "--json")
    assert (told.code, told.error["class"], told.out) == (8, "IntegrityError", "")
    assert not to.exists()


def test_a_source_that_is_gone(site, chain):
    _, sources = chain
    (site.store / sources[0]).rename(site.folder / "elsewhere")
    told = site.run("restore", "1", "--to", str(site.folder / "to"), "--json")
    assert (told.code, told.error["class"]) == (4, "SourceNotFound")


def test_unknown_image_and_increment(site, chain):
    assert site.run("restore", "9").code == 4
    told = site.run("restore", "1", "--increment", "7")
    assert (told.code, told.err.splitlines()[1]) == (4, "  It has: 0, 1.")


def test_disks_come_back_where_the_hypervisor_plugin_is_away(site, chain):
    site.config.write_text(site.config.read_text().replace('hypervisor = "files"', 'hypervisor = "gone"'))
    to = site.folder / "to"
    told = site.run("restore", "1", "--to", str(to), "--name", "copy")
    assert told.code == 0
    assert "no definition was made: no plugin 'gone' is installed" in told.err
    assert names(to) == ["copy-disk-vda.qcow2", "copy-disk-vdb.qcow2"]


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "-x", "new\nline"])
def test_a_name_that_could_be_no_file_is_refused(site, chain, name):
    told = site.run("restore", "1", f"--name={name}", "--to", str(site.folder / "to"))
    assert told.code == 2
    assert not (site.folder / "to").exists()


def test_an_odd_vm_name_gives_safe_files(site, chain):
    site.rename(WEB, "../-etc/\x1b[31m")
    source = site.run("backup", WEB.uuid, "--json").json["source"]
    made = site.run("restore", "1", "--to", str(site.folder / "to"), "--json").json
    assert made["name"] == f"_._-etc__[31m-{source[:8]}"
    assert all(Path(disk["path"]).parent == site.folder / "to" for disk in made["disks"])
    assert "\x1b" not in site.run("image", "list").out


def test_a_long_vm_name_is_cut(site, chain):
    site.rename(WEB, "ü" * 100)
    source = site.run("backup", WEB.uuid, "--json").json["source"]
    made = site.run("restore", "1", "--to", str(site.folder / "to"), "--json").json
    assert made["name"] == f"{'ü' * 70}-{source[:8]}"
    assert len(made["name"].encode()) <= 150, "as of a name that is given"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("web1", "web1"), ("-x", "_x"), ("..", "_."), (".", "_"), ("", "_"), ("a/b", "a_b"), ("ü" * 200, "ü" * 75)],
)
def test_file_names(name, expected):
    assert file_name(name) == expected


def test_sources_are_shortened_until_they_are_unique():
    assert short("25f4b298aaaa", ["25f4b298aaaa", "6968545cbbbb"]) == "25f4b298"
    assert short("25f4b298aaaa", ["25f4b298aaaa", "25f4b298abbb"]) == "25f4b298aa"
    assert short("abc", ["abc", "abcd"]) == "abc"


def test_a_signal_stops_a_restore_and_leaves_nothing(site, chain):
    (site.store / "wait-restore").touch()
    to = site.folder / "to"
    to.mkdir()
    child = site.start("restore", "1", "--to", str(to))
    site.until((site.store / "waits").exists, "the restore")
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err.splitlines()[-1]) == (130, "vmkeep: cancelled")
    assert names(to) == []
    assert not list((site.state / "runs").iterdir())


def test_no_image_can_be_deleted_while_it_is_restored(site, chain):
    (site.store / "wait-restore").touch()
    child = site.start("restore", "1", "--to", str(site.folder / "to"))
    site.until((site.store / "waits").exists, "the restore")
    told = site.run("image", "delete", "1", "--yes")
    assert (told.code, "image 1 is in use" in told.err) == (10, True)
    other = site.start("restore", "1", "--to", str(site.folder / "other"))
    (site.store / "wait-restore").unlink()
    for process in (child, other):
        process.communicate(timeout=60)
        assert process.returncode == 0, "two restores may run at once"


@pytest.mark.parametrize("number", [0, 1])
def test_raw_files_and_a_definition_for_them(site, chain, number):
    truths, _ = chain
    to = site.folder / "to"
    made = site.run("restore", "1", "--increment", str(number), "--format", "raw", "--to", str(to), "--json").json
    assert [Path(disk["path"]).suffix for disk in made["disks"]] == [".raw", ".raw"]
    for disk in made["disks"]:
        assert Path(disk["path"]).read_bytes() == truths[number][disk["id"]]
    assert Path(made["xml"]).exists()


def test_verify_only_reads_all_and_writes_nothing(site, chain, monkeypatch):
    _, sources = chain
    folder = site.folder / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    made = site.run("restore", "1", "--verify-only", "--json").json
    assert (made["increment"], [disk["path"] for disk in made["disks"]]) == (1, [None, None])
    told = site.run("restore", "1", "--verify-only", "--disk", "vdb")
    assert told.out == "disk vdb is well\nincrement 1 of image 1 can be restored\n"
    stored = site.store / sources[0] / "disk.vda.qcow2"
    content = bytearray(stored.read_bytes())
    content[-10] ^= 1
    stored.write_bytes(content)
    assert site.run("restore", "1", "--verify-only").code == 8
    assert site.run("restore", "1", "--verify-only", "--disk", "vdb").code == 0
    assert names(folder) == []


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_one_disk_to_the_standard_output(site, chain, form):
    truths, _ = chain
    path = site.folder / "stream.qcow2"
    with path.open("wb") as out:
        child = subprocess.run(
            [sys.executable, "-m", "vmkeep", "restore", "1", "--disk", "vda", "--stdout", "--format", form],
            env={**os.environ, "PYTHONPATH": site.paths, "VMKEEP_CONFIG": str(site.config)},
            stdout=out,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert child.returncode == 0, child.stderr
    assert (path.read_bytes() if form == "raw" else raw(path)) == truths[1]["vda"]


@pytest.mark.parametrize(
    "options",
    [
        ("--stdout", "--verify-only"),
        ("--stdout", "--to", "x"),
        ("--stdout", "--json"),
        ("--overwrite",),
        ("--pool", "images", "--in-place"),
        ("--pool", "images", "--verify-only"),
        ("--pool", "images", "--device", "/dev/null"),
        ("--device", "/dev/null", "--format", "qcow2"),
        ("--device", "/dev/null", "--disk", "vda"),
        ("--stdout",),
    ],
)
def test_what_does_not_go_together_is_refused(site, chain, options):
    assert site.run("restore", "1", *options).code == 2


def test_a_pool_that_is_not_there_is_told_before_anything_is_fetched(site, chain):
    (site.store / "wait-restore").touch()  # whoever fetches waits
    told = site.run("restore", "1", "--pool", "images", "--to", str(site.folder / "to"), "--json")
    assert (told.code, told.error["message"]) == (4, "there is no storage pool images")
    assert not (site.folder / "to").exists()


def test_where_nobody_can_tell_which_vm_the_device_belongs_to_it_is_said(site, chain):
    site.guests.rename(site.folder / "away")
    told = site.run("restore", "1", "--disk", "vda", "--device", str(site.folder / "none"))
    assert told.code != 0
    assert "which VM the device belongs to was not looked at: the hypervisor is away" in told.err


class Overlaid:
    """A hypervisor with one VM that is off, and writes to an overlay on a device."""

    def __init__(self, device: Path) -> None:
        self.device = device

    def vms(self) -> list[VMState]:
        disk = VMDisk(id="vda", path="/overlays/vda", format="qcow2", virtual_size=1, lies_on=str(self.device))
        return [VMState(vm=WEB, state="off", disks=(disk,))]


def test_a_device_below_an_overlay_is_not_written_to(site):
    """The overlay would show through, block by block."""
    site.run("backup", "web1")
    device = site.folder / "device"
    device.write_bytes(b"x" * 4096)
    place = Workplace(config.load(site.config))
    vars(place)["hypervisor"] = Overlaid(device)
    with pytest.raises(Busy, match="writes to an overlay on it: /overlays/vda") as refused:
        restore_elsewhere.onto(place, "1", device, disks=["vda"], overwrite=True)
    assert "vmkeep recover web1" in refused.value.hint
    assert device.read_bytes() == b"x" * 4096
