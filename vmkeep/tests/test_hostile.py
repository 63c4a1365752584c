"""A datastore in which somebody else has written: nothing of it is believed, and nothing of the host gets into a VM."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3
from kept_in_files import DB, WEB

from backupcore.errors import TargetFull, from_os_error

CLUSTER = 65536


@pytest.fixture
def chain(site) -> list[str]:
    """Three increments of web1; their sources."""
    sources = []
    for number in range(3):
        site.write(WEB, "vda", number * 100_000, f"night {number}".encode() * 10_000)
        sources.append(site.run("backup", "web1", "--json").json["source"])
    return sources


def edit(path: Path, **change: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def exchange(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def another_vms(site, sources: list[str]) -> None:
    other = site.run("backup", DB.name, "--json").json["source"]
    exchange(site.store / sources[1], site.store / other)


LINKS = {
    "missing": (lambda site, s: shutil.rmtree(site.store / s[1]), 4, "no longer in datastore nas"),
    "damaged": (lambda site, s: os.truncate(site.store / s[1] / "disk.vda.qcow2", 0), 8, "has 0 bytes"),
    "another VM's": (another_vms, 8, "backup of another VM"),
    "out of order": (lambda site, s: exchange(site.store / s[1], site.store / s[2]), 8, "not the backup that was"),
    "of a newer format": (lambda site, s: edit(site.store / s[1] / "manifest.json", format=2), 9, "format 2"),
    "a manifest of 1 GiB": (
        lambda site, s: os.truncate(site.store / s[1] / "manifest.json", 1 << 30),
        8,
        "larger than 16 MiB",
    ),
    "a path for a name": (
        lambda site, s: edit(
            site.store / s[1] / "manifest.json", artifacts=[{"name": "../x", "size": 1, "digest": "0" * 64}]
        ),
        8,
        "not a manifest",
    ),
}


def test_a_link_that_is_not_what_it_was_fails_every_verb_and_leaves_the_older_ones(site, chain):
    places = (site.state, site.store)
    for place in places:
        shutil.copytree(place, place.with_name(f"{place.name}-kept"))
    for what, (harm, code, word) in LINKS.items():
        harm(site, chain)
        to = site.folder / "to"
        for command in (
            ("restore", "1", "--to", str(to)),
            ("restore", "1", "--verify-only"),
            ("image", "flatten", "1"),
            ("vm", "compare", "web1"),
        ):
            told = site.run(*command, "--json")
            assert (told.code, word in told.error["message"]) == (code, True), (what, command, told.err)
            assert not to.exists()
        told = site.run("image", "verify", "1", "--json")
        assert told.code == 8
        found = json.loads(told.out)["increments"]
        assert [bool(one["problem"]) for one in found] == [False, True, True], what
        assert word in found[1]["problem"]
        assert site.run("restore", "1", "--increment", "0", "--to", str(to)).code == 0
        shutil.rmtree(to)
        for place in places:
            shutil.rmtree(place)
            shutil.copytree(place.with_name(f"{place.name}-kept"), place)


def test_a_manifest_of_1_gib_is_not_read(site, chain):
    os.truncate(site.store / chain[2] / "manifest.json", 1 << 30)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (768 << 20, 768 << 20))

    child = subprocess.run(
        [sys.executable, "-m", "vmkeep", "restore", "1", "--verify-only"],
        env={**os.environ, "PYTHONPATH": site.paths, "VMKEEP_CONFIG": str(site.config)},
        preexec_fn=limited,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (child.returncode, "larger than 16 MiB" in child.stderr) == (8, True), child.stderr


def backing_file(disk: bytearray, secret: Path) -> None:
    """The header names a file of the host as what lies below."""
    name = str(secret).encode()
    struct.pack_into(">QI", disk, 8, 200, len(name))
    disk[200 : 200 + len(name)] = name


def external_data(disk: bytearray, secret: Path) -> None:
    """The header says that the data lie in a file of the host."""
    name = str(secret).encode()
    struct.pack_into(">Q", disk, 72, 1 << 2)
    struct.pack_into(">II", disk, 104, 0x44415441, len(name))
    disk[112 : 112 + len(name)] = name


def below_the_tables(disk: bytearray, secret: Path) -> None:
    """A guest's cluster is the header: what the host wrote, and not the guest."""
    del secret
    (l1,) = struct.unpack_from(">Q", disk, 40)
    (l2,) = struct.unpack_from(">Q", disk, l1)
    struct.pack_into(">Q", disk, l2 & ~(1 << 63), 1 << 63)


def twice(disk: bytearray, secret: Path) -> None:
    """Two of a guest's clusters are one in the file."""
    del secret
    (l1,) = struct.unpack_from(">Q", disk, 40)
    (l2,) = struct.unpack_from(">Q", disk, l1)
    at = l2 & ~(1 << 63)
    entries = [place for place in range(at, at + CLUSTER, 8) if struct.unpack_from(">Q", disk, place)[0]]
    disk[entries[1] : entries[1] + 8] = disk[entries[0] : entries[0] + 8]


@pytest.mark.parametrize("harm", [backing_file, external_data, below_the_tables, twice])
def test_a_hostile_disk_whose_digests_are_right_is_refused(
    site, harm: Callable[[bytearray, Path], None], tmp_path: Path
):
    """As far as somebody can come who writes to the datastore: a host whose catalog is lost believes its manifests."""
    site.write(WEB, "vda", 0, b"guest" * 100_000)
    source = site.run("backup", "web1", "--json").json["source"]
    secret = tmp_path / "secret"
    secret.write_bytes(b"of the host" * 10_000)
    path = site.store / source / "disk.vda.qcow2"
    disk = bytearray(path.read_bytes())
    manifest = json.loads((site.store / source / "manifest.json").read_text())
    (part,) = [one for one in manifest["disks"] if one["id"] == "vda"]
    data = (site.store / source / "sums.vda").stat().st_size // 32 * CLUSTER
    tables = len(disk) - data
    assert blake3(disk[:tables]).hexdigest() == part["tables_digest"]
    harm(disk, secret)
    path.write_bytes(disk)
    part["tables_digest"] = blake3(disk[:tables]).hexdigest()
    edit(site.store / source / "manifest.json", **manifest)
    shutil.rmtree(site.state)
    assert len(site.run("catalog", "rebuild", "nas", "--json").json["added"]) == 1
    for options in (("--to", str(site.folder / "to")), ("--verify-only",)):
        told = site.run("restore", "1", "--json", *options)
        assert told.code == 8, told.err
    assert not (site.folder / "to").exists()


# What lies in the place of a small file of vmkeep's


def replaced(path: Path, by: str) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if by == "a FIFO":
        os.mkfifo(path)
    elif by == "a folder":
        path.mkdir()
    elif by == "10 GiB":
        path.touch()
        os.truncate(path, 10 << 30)
    else:
        path.symlink_to(by)


@pytest.mark.parametrize("by", ["a FIFO", "a folder", "10 GiB", "/dev/zero"])
def test_what_is_no_file_is_one_clear_line_at_once(site, by):
    assert site.run("backup", "web1").code == 0
    installation, lock = site.state / "installation", site.state / "locks" / f"vm-{WEB.uuid}"
    for path, verb, code in (
        (site.config, ["image", "list"], 2),
        (installation, ["backup", "web1"], 2),
        (site.state / "catalog.sqlite.lock", ["backup", "web1"], 2),
        (lock, ["backup", "web1"], 2),
    ):
        kept = path.with_name("kept")
        path.rename(kept)
        replaced(path, by)
        told = site.process(*verb)
        if by == "10 GiB" and "lock" in str(path):
            assert told.code == 0, told.err  # nothing of it is read but its beginning
        else:
            assert (told.code, told.err.count("\n")) == (code, 2), (path, told)
            assert str(path) in told.err
            assert "it is" in told.err or "it has more than" in told.err
        replaced(path, "nowhere")
        path.unlink()
        kept.rename(path)
    assert site.run("backup", "web1").code == 0


def test_long_numbers_and_names_are_cut(site):
    assert site.run("backup", "web1").code == 0
    folder = site.folder / ("x" * 300)
    for verb, code in (
        (["restore", "1", "--to", str(folder)], 2),
        (["restore", "1", "--increment", "9" * 400, "--to", str(site.folder / "to")], 4),
        (["restore", "1", "--increment", "9" * 9000, "--to", str(site.folder / "to")], 2),
        (["image", "show", "9" * 9000], 4),
    ):
        told = site.run(*verb)
        assert (told.code, "bug" in told.err) == (code, False), (verb[:3], told.err[:500])
        assert len(told.err) < 2500


def test_a_limit_on_the_size_of_files_is_no_full_disk(site):
    script = 'ulimit -f 16; exec "$@"'
    child = subprocess.run(
        ["bash", "-c", script, "bash", sys.executable, "-m", "vmkeep", "backup", "web1"],
        env={**os.environ, "PYTHONPATH": site.paths, "VMKEEP_CONFIG": str(site.config)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 5, child.stderr
    assert "ulimit -f" in child.stderr
    assert "Make room" not in child.stderr
    told = from_os_error(OSError(errno.EFBIG, os.strerror(errno.EFBIG)), "a file")
    assert (type(told), "ulimit -f" in told.hint, "room" in told.hint) == (TargetFull, True, False)


@pytest.mark.parametrize("by", ["a FIFO", "a folder", "/dev/zero"])
def test_the_lock_of_another_vm_that_is_no_file_stops_no_cancel(site, by):
    assert site.run("backup", "web1").code == 0
    replaced(site.state / "locks" / f"vm-{DB.uuid}", by)
    told = site.process("cancel", "web1")
    assert told.code == 4, told.err
    assert "bug" not in told.err


@pytest.mark.parametrize("by", ["a FIFO", "a folder", "10 GiB", "/dev/zero"])
def test_the_record_of_a_dead_run_that_is_no_file_is_left_alone(site, by):
    (site.store / "die").touch()
    assert site.process("backup", "web1").code == -9
    (site.store / "die").unlink()
    (folder,) = (site.state / "runs").iterdir()
    for file in sorted(folder.glob("*.json")):
        replaced(file, by)
    told = site.process("backup", "web1")
    assert told.code == 3, told.err
    assert "cannot be read" in told.err
    assert "holds 1 backup of this VM" in told.err, "what it has stored is not recorded, and not lost"
