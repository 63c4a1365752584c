"""``vmkeep vm compare`` with real VMs: a bitmap that lies is found, one that tells the truth passes."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from lab.domain_xml import DiskSpec
from lab.host import RUNNING, Host, wait_until

MIB = 1 << 20
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def host(make_vm, libvirt_uri: str, vm_folder: Path) -> Host:
    disks = [
        DiskSpec(target="vda", size=32 * MIB),
        DiskSpec(target="vdb", size=16 * MIB + 512),
        DiskSpec(target="vdc", size=MIB, format="raw"),
    ]
    vm = make_vm(disks, label="compare")
    vm.io("vda", "write -P 0x55 1M 8M")
    vm.io("vdb", "write -P 0x11 0 2M", "write -P 0x12 16M 512")
    host = Host(vm_folder, vm, libvirt_uri, driver="lab")
    host.backup()
    vm.io("vda", "write -P 0x66 3M 1M", "write -z 5M 1M", "discard 7M 1M")
    assert host.backup()["type"] == "INCREMENT"
    vm.io("vda", "write -P 0x77 20M 64k")  # since the last backup
    return host


def compare(host: Host, *options: str) -> tuple[int, dict, str]:
    done = host.run("--json", "vm", "compare", host.vm.name, "--sample", "100", *options)
    return done.code, json.loads(done.out) if done.out else {}, done.err


def lie(host: Host, disk: str, *commands: str) -> None:
    """Write to a disk that no bitmap records: they are taken out and put back as they were, one bit for each byte."""
    path = str(host.vm.disk(disk))
    info = json.loads(
        subprocess.run(["qemu-img", "info", "--output=json", path], check=True, capture_output=True).stdout
    )
    names = [one["name"] for one in info["format-specific"]["data"]["bitmaps"]]
    kept = host.folder / "kept.qcow2"
    size = str(info["virtual-size"])
    qemu_img("create", "-q", "-f", "qcow2", str(kept), size)
    for name in names:
        qemu_img("bitmap", "--add", "--disable", str(kept), name)
        qemu_img("bitmap", "--merge", name, "-b", path, "-F", "qcow2", str(kept), name)
        qemu_img("bitmap", "--remove", path, name)
    arguments = [part for command in commands for part in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *arguments, path], check=True, capture_output=True)
    for name in names:
        qemu_img("bitmap", "--add", path, name)
        qemu_img("bitmap", "--merge", name, "-b", str(kept), "-F", "qcow2", path, name)


def qemu_img(*arguments: str) -> None:
    subprocess.run(["qemu-img", *arguments], check=True, capture_output=True)


def test_a_bitmap_that_tells_the_truth_passes_and_one_that_lies_is_found(host: Host):
    checkpoints, recorded = host.checkpoints(), host.recorded()
    code, found, err = compare(host)
    assert code == 0, err
    vda, vdb, vdc = found["disks"]
    assert (vda["unchanged"], vdb["unchanged"]) == (32 * MIB - 65536, 16 * MIB + 512)
    assert vda["compared"] >= 6 * MIB
    assert vdb["compared"] >= 2 * MIB + 512
    assert vdc["why_not"].startswith("raw"), vdc
    assert host.left() == []
    assert (host.checkpoints(), host.recorded()) == (checkpoints, recorded)
    assert host.vm.domain.state()[0] == RUNNING

    host.vm.destroy()
    wrong = write_unseen(host)
    host.vm.start()
    assert_found(host, wrong)


def write_unseen(host: Host) -> dict[str, list[dict[str, int]]]:
    """Data over data, zeros over data, data over nothing, the last bytes; what a comparison has to find."""
    lie(host, "vda", "write -P 0x99 3584k 64k", "write -z 1M 128k", "write -P 0x9a 30M 64k")
    lie(host, "vdb", "write -P 0x99 16M 512")
    places = {"vda": [(MIB, 131072), (3584 * 1024, 65536), (30 * MIB, 65536)], "vdb": [(16 * MIB, 512)]}
    return {
        disk: [{"offset": offset, "length": length} for offset, length in ranges] for disk, ranges in places.items()
    }


def assert_found(host: Host, wrong: dict[str, list[dict[str, int]]]) -> None:
    code, found, err = compare(host)
    assert code == 8, err
    assert {one["id"]: one["differing"] for one in found["disks"] if one["differing"]} == wrong
    error = json.loads(err.splitlines()[-1])["error"]
    assert (error["class"], error["exit_code"]) == ("IntegrityError", 8)
    assert f"disk vda at {MIB} (131072 bytes), {3584 * 1024} (65536 bytes)" in error["message"]
    assert "--reset" in error["hint"]
    assert host.left() == []


@pytest.mark.soak
def test_the_same_of_a_vm_that_is_off_and_what_the_lie_costs_without_it(host: Host):
    host.vm.destroy()
    code, found, err = compare(host)
    assert code == 0, err
    assert found["disks"][0]["unchanged"] == 32 * MIB - 65536
    assert host.left() == []
    assert_found(host, write_unseen(host))
    host.vm.start()
    truth = host.note_truth("now")
    taken = host.backup()
    assert taken["type"] == "INCREMENT"
    assert host.differing(1, taken["increment"], truth) == ["vda", "vdb"]
    taken = host.backup("--reset")
    assert host.differing(taken["image"], 0, truth) == []
    assert compare(host)[0] == 0


@pytest.mark.soak
@pytest.mark.parametrize(
    "step",
    [
        "backupcore_libvirt.connection:Domain.begin_backup return",
        "backupcore.disk.reader.reader:Reader.call return",
        "backupcore_libvirt.connection:Domain.abort_job call",
    ],
)
def test_a_comparison_that_is_killed_is_cleared_away_by_the_next_backup(host: Host, step: str):
    checkpoints = host.checkpoints()
    killed = host.run("vm", "compare", host.vm.name, at=step)
    assert killed.code == -signal.SIGKILL, killed.err
    wait_until(lambda: host.vm.domain.state()[0] == RUNNING, "the guest to run")
    host.vm.io("vda", "read 0 4k")
    truth = host.note_truth("after")
    taken = host.backup()
    assert taken["type"] == "INCREMENT"
    assert host.left() == []
    assert set(checkpoints) & set(host.checkpoints())
    assert host.differing(1, taken["increment"], truth) == []
