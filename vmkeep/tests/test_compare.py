"""``vmkeep vm compare``: what is said not to have changed, held against what the chain would restore."""

from __future__ import annotations

import json
import shlex
import shutil

import pytest
from kept_in_files import DB, WEB

from backupcore.disk.extents import CLUSTER


def three_increments(site):
    site.run("backup", "web1")
    site.write(WEB, "vda", 2 << 20, b"second" * 50_000)
    site.run("backup", "web1")
    site.write(WEB, "vda", 70_000, bytes(200_000))
    site.write(WEB, "vdb", (1 << 20) + 1000, b"grown")
    assert site.run("backup", "web1", "--json").json["increment"] == 2


@pytest.fixture
def chain(site, once):
    """A full and two increments: data, zeros over data, and a disk that grew."""
    once(site, three_increments)
    return site


def compared(site, *options: str):
    told = site.run("vm", "compare", "web1", "--json", *options)
    return told, json.loads(told.out)


def test_what_was_tracked_is_equal_and_nothing_is_recorded(chain):
    # The guest goes on: on what was backed up, behind it, and past the old end of a disk.
    chain.write(WEB, "vda", 300_000, b"later")
    chain.write(WEB, "vdb", 3 << 20, b"later")
    before = chain.guest(WEB).checkpoints
    images = chain.run("image", "show", "1", "--json").json
    told, found = compared(chain)
    assert told.code == 0, told.err
    vda, vdb = found["disks"]
    assert (found["ok"], found["image"], found["increment"]) == (True, 1, 2)
    assert vda["unchanged"] == (4 << 20) - CLUSTER
    assert 0 < vda["compared"] < vda["unchanged"], "where both sides are zeros nothing is read"
    assert vdb["unchanged"] == 1 << 20, "what is behind the end at the backup cannot be compared"
    assert chain.guest(WEB).checkpoints == before
    assert not chain.guest(WEB).busy
    assert chain.run("image", "show", "1", "--json").json == images
    assert chain.run("vm", "show", "web1", "--json").json["last_runs"][0]["increment"] == 2
    assert list((chain.state / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("disk", "offset", "data", "length"),
    [
        ("vda", (2 << 20) + 9, b"!", CLUSTER),  # data of an increment
        ("vda", 400_000, bytes(80_000), 2 * CLUSTER),  # data became zeros
        ("vda", 131_072, b"!", CLUSTER),  # zeros over data became data again
        ("vda", (3 << 20) + 1, b"!", CLUSTER),  # what was never written
        ("vdb", (1 << 20) + 1004, b"!", 1005),  # the last bytes of a disk
    ],
)
def test_a_write_that_nothing_tracked_is_found(chain, disk: str, offset: int, data: bytes, length: int):
    chain.write_unseen(WEB, disk, offset, data)
    told, found = compared(chain, "--sample", "100")
    assert told.code == 8
    (wrong,) = [one for one in found["disks"] if one["differing"]]
    assert (wrong["id"], found["ok"]) == (disk, False)
    assert wrong["differing"] == [{"offset": offset // CLUSTER * CLUSTER, "length": length}]
    assert told.error["class"] == "IntegrityError"
    assert f"disk {disk} at {offset // CLUSTER * CLUSTER} ({length} bytes)" in told.error["message"]
    assert "vmkeep backup web1 -d nas --reset" in told.error["hint"]
    for_people = chain.run("vm", "compare", "web1")
    assert for_people.code == 8
    assert "1 ranges differ" in for_people.out
    # The way out that it names.
    assert chain.run("backup", "web1", "-d", "nas", "--reset").code == 0
    told, found = compared(chain)
    assert (told.code, found["image"]) == (0, 2)


def test_what_was_written_is_not_compared(chain):
    chain.write(WEB, "vda", 2 << 20, b"tracked")
    chain.write_unseen(WEB, "vda", (2 << 20) + 9, b"!")
    assert compared(chain)[0].code == 0


def test_one_disk_and_one_that_is_not_there(chain):
    chain.write_unseen(WEB, "vda", 2 << 20, b"!")
    told, found = compared(chain, "--disk", "vdb")
    assert told.code == 0
    assert [one["id"] for one in found["disks"]] == ["vdb"]
    told = chain.run("vm", "compare", "web1", "--json", "--disk", "vdz")
    assert (told.code, told.error["hint"]) == (4, "It holds: vda, vdb.")


def test_damage_of_the_chain_is_damage_of_the_chain(chain):
    newest = chain.run("image", "show", "1", "--json").json["increments"][-1]["source"]
    sums = chain.store / newest / "sums.vda"
    sums.write_bytes(sums.read_bytes()[:-1] + b"\0")
    told = chain.run("vm", "compare", "web1", "--json")
    assert told.code == 8
    assert "sums.vda is not what was written" in told.error["message"]
    shutil.rmtree(chain.store / newest)
    assert chain.run("vm", "compare", "web1", "--json").code == 4
    assert not chain.guest(WEB).busy


def test_where_nothing_can_be_compared_it_says_why(chain):
    told = chain.run("vm", "compare", "db1", "--json")
    assert (told.code, told.error["hint"]) == (4, "Take one: vmkeep backup db1 -d nas")
    chain.rename(DB, "our db; it's")  # what is copied from a hint must be one word for a shell
    told = chain.run("vm", "compare", "our db; it's", "--json")
    assert shlex.split(told.error["hint"])[-5:] == ["vmkeep", "backup", "our db; it's", "-d", "nas"]
    assert chain.run("vm", "compare", "none").code == 4
    chain.run("vm", "forget", "web1")
    told = chain.run("vm", "compare", "web1", "--json")
    assert (told.code, told.error["hint"]) == (9, "The next backup is a full.")
    chain.run("vm", "updateconf", "web1", "--mode", "FULL")
    told = chain.run("vm", "compare", "web1", "--json")
    assert told.code == 9
    assert "MODE=FULL" in told.error["message"]
    chain.run("vm", "updateconf", "web1", "--mode", "INCREMENT")
    manifest = next(chain.store.glob("*/disk.vda.qcow2"))
    manifest.write_bytes(b"damaged")
    chain.run("image", "verify", "1")
    told = chain.run("vm", "compare", "web1", "--json")
    assert (told.code, "image 1 of VM web1 is damaged" in told.error["message"]) == (9, True)
    assert DB.uuid not in told.err


def test_nothing_else_may_work_on_the_vm_meanwhile(chain):
    (chain.store / "wait-restore").touch()
    child = chain.start("vm", "compare", "web1")
    chain.until((chain.store / "waits").exists, "the comparison")
    told = chain.run("backup", "web1", "--json")
    assert told.code == 10
    assert "a comparison of VM web1 is already running" in told.error["message"]
    stopped = chain.run("cancel", "web1", "--json").json
    assert stopped["doing"] == "a comparison"
    assert child.wait(30) == 130
    (chain.store / "wait-restore").unlink()
    assert chain.run("backup", "web1").code == 0


def test_a_flattened_chain_and_a_disk_that_differs_all_over(site):
    site.write(WEB, "vda", 0, b"data" * (4 << 20))  # 16 MiB
    site.run("backup", "web1")
    site.write(WEB, "vda", 5 << 20, bytes(1 << 20))
    site.run("backup", "web1")
    assert site.run("image", "flatten", "1").code == 0
    told, found = compared(site, "--sample", "100")
    assert (told.code, found["increment"], found["disks"][0]["compared"]) == (0, 1, 15 << 20)
    content = site.guest(WEB).disks["vda"]
    for at in range(0, len(content), 2 * CLUSTER):
        content[at] ^= 1
    site.write_unseen(WEB, "vda", 0, content)
    told, found = compared(site, "--sample", "100")
    assert told.code == 8
    assert len(found["disks"][0]["differing"]) == 100, "that is enough to know"
    assert found["disks"][0]["compared"] < 15 << 20
    assert "and elsewhere" in told.error["message"]
