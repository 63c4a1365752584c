"""The catalog: versions, several processes at once, numbers, damage."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from kept_in_files import WEB

from backupcore.errors import BackupError, ConfigError, ContractViolation, IntegrityError, UnsupportedOperation
from backupcore.model import BackupRun, Disk, Increment, Link, Prepared, SourceRef, Type, new_id
from backupcore.session import Recorded
from vmkeep import adoption, folders
from vmkeep.catalog import images, runs
from vmkeep.catalog.database import Catalog

DISKS = (Disk(id="vda", artifact="disk.vda.qcow2", virtual_size=1 << 20, whole=True),)


def recorded(parent: Recorded | None = None, *, datastore: str = "nas") -> Recorded:
    number = parent.increment.id + 1 if parent else 0
    kind = Type.INCREMENT if parent else Type.FULL
    link = Link(point=parent.increment.point, digest=parent.increment.digest, disks=DISKS) if parent else None
    run = BackupRun(
        id=new_id(),
        vm=WEB,
        host="here",
        datastore=datastore,
        image=parent.run.image if parent else new_id(),
        number=number,
        point=new_id(),
        type=kind,
        parent=link,
    )
    increment = Increment(
        id=number,
        pid=number - 1,
        type=kind,
        point=run.point,
        source=SourceRef(new_id()),
        size=123,
        date=datetime.now(UTC),
        consistency="crash",
        reason="" if parent else "first",
        digest="0" * 64,
        disks=DISKS,
    )
    return Recorded(run=run, increment=increment, stored=None, read=7, frozen_seconds=0.1, left_out=(), seconds=1.5)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog.open(tmp_path / "state" / "catalog.sqlite")


def test_what_was_recorded_is_read_back_equal(catalog):
    first = recorded()
    second = recorded(first)
    assert [runs.record(catalog, one) for one in (first, second)] == [1, 1]
    image = images.find(catalog, "1")
    assert image.increments == (first.increment, second.increment)
    assert (image.uuid, image.vm, image.state, image.pinned) == (first.run.image, WEB, "open", False)


def proved(one: Recorded, *probes: tuple[int, str]) -> Recorded:
    """The same, with what the hypervisor wants to know of the disk at the next backup."""
    below = (("/base.qcow2", 7, 1 << 20, 1_700_000_000_123_456_789),)
    disks = tuple(replace(disk, marked=True, below=below, probes=probes) for disk in one.increment.disks)
    return replace(one, increment=replace(one.increment, disks=disks))


def test_what_proves_a_disk_is_read_back_for_the_increment_that_is_built_on(catalog):
    first = proved(recorded(), (0, "ab" * 32))
    second = proved(recorded(first), (65536, "cd" * 32), (1 << 40, "ef" * 32))
    for one in (first, second):
        runs.record(catalog, one)
    (image,) = images.where(catalog)
    assert image.increments[-1] == second.increment
    assert image.increments[0].disks == tuple(
        replace(disk, marked=False, below=None, probes=()) for disk in first.increment.disks
    )


def test_a_run_in_its_folder_keeps_what_proves_its_parents_disks(tmp_path):
    first = proved(recorded(), (0, "ab" * 32))
    link = Link(point=first.increment.point, digest="0" * 64, disks=first.increment.disks)
    run = replace(recorded(first).run, parent=link)
    assert folders.load_run(folders.dump_run(run)) == run
    prepared = Prepared(artifacts=(), date=datetime.now(UTC), consistency="off", frozen_seconds=0.0, disks=link.disks)
    adoption.note(tmp_path, run, prepared)
    noted = json.loads((tmp_path / "prepared.json").read_text())
    assert tuple(Disk(**disk) for disk in noted["disks"]) == link.disks


def test_one_image_is_open_per_vm_and_datastore(catalog):
    for one in (recorded(), recorded(datastore="cloud"), recorded()):
        runs.record(catalog, one)
    assert [(image.datastore, image.state) for image in images.where(catalog)] == [
        ("nas", "closed"),
        ("cloud", "open"),
        ("nas", "open"),
    ]


def test_an_increment_needs_the_parent_that_it_was_taken_against(catalog):
    first = recorded()
    orphan = recorded(first)
    with pytest.raises(IntegrityError):
        runs.record(catalog, orphan)
    runs.record(catalog, first)
    foreign = replace(orphan, run=replace(orphan.run, parent=replace(orphan.run.parent, point=new_id())))
    with pytest.raises(IntegrityError):
        runs.record(catalog, foreign)
    runs.record(catalog, orphan)
    with pytest.raises(ContractViolation, match="gave token"):
        runs.record(catalog, orphan)
    again = replace(orphan, increment=replace(orphan.increment, source=SourceRef(new_id())))
    with pytest.raises(IntegrityError):
        runs.record(catalog, again)
    runs.record(catalog, recorded())
    with pytest.raises(IntegrityError):
        runs.record(catalog, recorded(orphan))
    assert len(images.find(catalog, "1").increments) == 2


def test_an_ambiguous_prefix_is_refused(catalog):
    for tail in "01":
        one = recorded()
        runs.record(catalog, replace(one, run=replace(one.run, image="abcdef" + tail * 26)))
    with pytest.raises(ConfigError, match="any of the images 1, 2"):
        images.find(catalog, "abcde")
    assert images.find(catalog, "abcdef1").number == 2


def test_a_newer_schema_is_refused_by_name(catalog, tmp_path):
    path = tmp_path / "state" / "catalog.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(UnsupportedOperation, match=r"schema 99, this version of vmkeep knows 4"):
        Catalog.open(path)


def test_a_file_that_is_no_catalog_is_damage(tmp_path):
    path = tmp_path / "catalog.sqlite"
    path.write_bytes(b"no database at all" * 1000)
    with pytest.raises(IntegrityError):
        Catalog.open(path)


def test_commits_are_synced_and_files_are_private(catalog, tmp_path):
    with catalog.reading() as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert (tmp_path / "state" / "catalog.sqlite").stat().st_mode & 0o077 == 0


def test_a_state_folder_that_cannot_be_is_one_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BackupError) as caught:
        Catalog.open(tmp_path / "file" / "catalog.sqlite")
    assert str(tmp_path) in caught.value.message


PROCESS = """
import sys
sys.path[:0] = sys.argv[2].split(":")
import test_catalog
from pathlib import Path
from vmkeep.catalog import images, runs
from vmkeep.catalog.database import Catalog
print("ready", flush=True)
for number in range(5):
    sys.stdin.readline()
    Catalog.open(Path(sys.argv[1]).with_name(f"new{number}"))
    print("opened", flush=True)
catalog = Catalog.open(Path(sys.argv[1]))
for _ in range(20):
    one = test_catalog.recorded(datastore=sys.argv[3])
    runs.begin(catalog, one.run)
    runs.record(catalog, one)
"""


def test_several_processes_open_a_new_catalog_and_write_at_once(tmp_path, installed):
    path = tmp_path / "state" / "catalog.sqlite"
    paths = f"{Path(__file__).parent}:{installed}"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(path), paths, f"store{number}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for _ in range(5):
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()
        for child in children:
            assert child.stdout.readline() == "opened\n", child.communicate()
    for child in children:
        _, err = child.communicate(timeout=120)
        assert (child.returncode, err) == (0, "")
    found = images.where(Catalog.open(path))
    assert [image.number for image in found] == list(range(1, 61))
    assert sum(image.state == "open" for image in found) == 3


# What lies in the place of the catalog


def away(path: Path) -> None:
    for one in path.parent.glob(f"{path.name}*"):
        one.unlink()


def zeros(path: Path, size: int) -> None:
    away(path)
    path.touch()
    os.truncate(path, size)


def link(path: Path, to: str) -> None:
    away(path)
    path.symlink_to(to)


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def no_tables(path: Path) -> None:
    away(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")


IN_ITS_PLACE = {
    "empty": lambda path: zeros(path, 0),
    "zeros": lambda path: zeros(path, 32768),
    "10 GiB of zeros": lambda path: zeros(path, 10 << 30),
    "no tables": no_tables,
    "a link to nothing": lambda path: link(path, "nowhere"),
    "/dev/zero": lambda path: link(path, "/dev/zero"),
    "a FIFO": fifo,
    "a folder": lambda path: (away(path), path.mkdir()),
    "a log without an end": lambda path: link(path.with_name(f"{path.name}-wal"), "/dev/zero"),
    "a log that is a FIFO": lambda path: fifo(path.with_name(f"{path.name}-wal")),
}


@pytest.mark.parametrize("what", IN_ITS_PLACE)
def test_what_is_no_catalog_beside_an_installation_is_refused(site, what):
    assert site.run("backup", "web1").code == 0
    path = site.state / "catalog.sqlite"
    IN_ITS_PLACE[what](path)
    for verb in (["backup", "web1"], ["image", "list"], ["backup", "web1", "--dry-run"], ["catalog", "check"]):
        told = site.process(*verb, "--json")
        assert told.code == 8, (verb, told)
        assert str(path) in told.error["message"]
        assert "vmkeep catalog rebuild DATASTORE" in told.error["hint"]
    for one in site.state.glob("catalog.sqlite*"):
        one.rmdir() if one.is_dir() and not one.is_symlink() else one.unlink()
    assert site.run("catalog", "rebuild", "nas").code == 0
    assert len(site.run("image", "list", "--json").json) == 1


def test_an_empty_file_in_a_new_state_folder_is_a_first_start(site):
    site.state.mkdir()
    (site.state / "catalog.sqlite").touch()
    assert site.run("image", "list", "--json").json == []
    assert site.run("backup", "web1").code == 0
    assert len(site.run("image", "list", "--json").json) == 1


def test_a_first_start_that_was_killed_is_a_first_start_again(tmp_path, installed):
    """Killed in its transaction, before the file had its name: nothing but the file that is being made is there."""
    script = (
        "import os, sys; sys.path[:0] = sys.argv[2].split(':')\n"
        "from pathlib import Path\n"
        "from vmkeep.catalog import database, schema\n"
        "create = schema.create\n"
        "schema.create = lambda connection: (create(connection), os.kill(os.getpid(), 9))\n"
        "database.Catalog.open(Path(sys.argv[1]))\n"
    )
    path = tmp_path / "state" / "catalog.sqlite"
    child = subprocess.run([sys.executable, "-c", script, str(path), installed], check=False)
    assert child.returncode == -9
    assert not path.exists()
    (tmp_path / "state" / "installation").touch()
    path.with_name("catalog.sqlite-wal").write_bytes(b"of one that was moved away")
    assert images.where(Catalog.open(path)) == []
