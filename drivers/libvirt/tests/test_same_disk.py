"""An increment is believed only if the disk proves that it is the one of the last backup, and that nothing was written
past what tracks it. Every chain is restored at the end, and held against QEMU's own copies.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import libvirt
import pytest

from backupcore.disk.extents import CLUSTER, Extent, Kind
from backupcore.disk.nbd import Client, dirty
from backupcore.disk.qcow2 import Layout
from backupcore_libvirt.premade.one_bit import make_one_bit
from backupcore_libvirt.qemu_nbd import QemuNbd
from backupcore_libvirt.reading.probes import carried, chosen, failed, places
from backupcore_libvirt.stamps import changed, stamps_below, stamps_of

MiB = 1 << 20
SNAPSHOT = {"MODE": "INCREMENT", "INCREMENT_MODE": "SNAPSHOT"}

either = pytest.mark.parametrize("running", [True, False], ids=["running", "off"])


def either_and(name: str, *values: str, quick: Sequence[tuple[str, bool]]) -> pytest.MarkDecorator:
    """Each value with a VM that runs and with one that is off; but for the `quick` ones in `make soak` alone."""
    return pytest.mark.parametrize(
        (name, "running"),
        [
            pytest.param(
                value,
                running,
                id=f"{value}-{'running' if running else 'off'}",
                marks=[] if (value, running) in quick else [pytest.mark.soak],
            )
            for value in values
            for running in (True, False)
        ],
    )


def tool(*command: object) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def whole(recorded) -> dict[str, str]:
    """The disks that are whole, and why; of a full all of them, for its reason."""
    if recorded.run.parent is None:
        return {disk.id: recorded.run.reason for disk in recorded.increment.disks}
    return {disk.id: disk.reason for disk in recorded.increment.disks if disk.whole}


def told(recorded, disks: str, *words: str) -> None:
    """These disks, named by their letters, are whole, and each reason has these words."""
    found = whole(recorded)
    assert sorted(found) == [f"vd{letter}" for letter in disks], found
    for reason in found.values():
        assert all(word in reason for word in words), reason


def exchange(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def on_base(vm, disk: str, shape: str = "qcow2", *, size: str = "16M") -> Path:
    """Put the disk of a VM that is off on a new base that holds data: the base."""
    path = vm.disk(disk)
    base = path.with_name(f"base-{disk}.{shape}")
    tool("qemu-img", "create", "-q", "-f", shape, base, size)
    tool("qemu-io", "-f", shape, "-c", "write -P 0x61 0 4M", "-c", "write -P 0x62 12M 1M", base)
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", shape, "-b", base, path)
    if os.geteuid() == 0:
        for made in (base, path):
            shutil.chown(made, vm.folder.stat().st_uid, vm.folder.stat().st_gid)
    return base


# The image of another disk


@either_and("how", "exchanged", "copied", quick=[("exchanged", True), ("copied", False)])
def test_files_of_two_disks_that_were_exchanged_or_copied(how, running, lab, chains):
    vm = lab.vm(["qcow2:16", "qcow2:16"], start=running)
    vm.write("vda", "write -P 0x11 0 4M")
    vm.write("vdb", "write -P 0x21 0 4M")
    chains.backup(vm)
    vm.write("vda", "write -P 0x12 1M 64k")
    assert whole(chains.backup(vm)) == {}
    if running:
        vm.destroy()
    if how == "exchanged":
        exchange(vm.disk("vda"), vm.disk("vdb"))
    else:
        shutil.copy(vm.disk("vdb"), vm.disk("vda"))
    if running:
        vm.start()
    vm.write("vda", "write -P 0x13 2M 64k")
    vm.write("vdb", "write -P 0x23 2M 64k")
    told(chains.backup(vm), "ab" if how == "exchanged" else "a", "another disk")
    vm.write("vda", "write -P 0x14 3M 64k")
    assert whole(chains.backup(vm)) == {}
    # And back, now that both bear marks of this chain.
    if running:
        vm.destroy()
    exchange(vm.disk("vda"), vm.disk("vdb"))
    told(chains.backup(vm), "ab", "another disk")
    chains.check()


# Cut off


@either
def test_a_disk_that_was_shrunk_and_grown_with_all_its_room(running, lab, chains):
    vm = lab.vm(["qcow2:16"], start=running)
    vm.write("vda", "write -P 0x11 0 16M")
    chains.backup(vm)
    if running:
        vm.destroy()
    vm.resize("vda", "--shrink", "8M")
    vm.write("vda", "write -P 0x12 0 64k")  # qemu-img 7.2 refuses the next step without
    vm.resize("vda", "--preallocation=full", "16M")
    if running:
        vm.start()
    told(chains.backup(vm), "a", "shrunk and grown")
    assert whole(chains.backup(vm)) == {}
    chains.check()


@either
@pytest.mark.parametrize("left", ["all but some", pytest.param("one cluster", marks=pytest.mark.soak)])
def test_a_disk_that_was_shrunk_and_grown_and_whose_end_was_rewritten(left, running, lab, chains):
    vm = lab.vm(["qcow2:32"], start=running)
    vm.write("vda", *(f"write -P 0x11 {at * 128}k 64k" for at in range(256)))
    chains.backup(vm)
    if running:
        for mebibytes in (8, 32):
            vm.domain.blockResize("vda", mebibytes * MiB, 1)
    else:
        vm.resize("vda", "--shrink", "8M")
        vm.resize("vda", "32M")
    kept = range(192) if left == "all but some" else [131]
    vm.write("vda", *(f"write -P 0x12 {at * 128}k 64k" for at in range(64, 256) if at not in kept))
    told(chains.backup(vm), "a", "shrunk and grown")
    assert whole(chains.backup(vm)) == {}
    chains.check()


# The files below


@either_and("what", "rebased", "written", "exchanged", "deep", quick=[("rebased", False), ("written", True)])
def test_a_base_that_is_another_one_or_was_written(what, running, lab, chains):
    vm = lab.vm(["qcow2:16", "qcow2:16"], start=False)
    base = on_base(vm, "vda")
    on_base(vm, "vdb", "raw")
    if running:
        vm.start()
    vm.write("vda", "write -P 0x11 0 64k")
    chains.backup(vm)
    vm.write("vda", "write -P 0x12 1M 64k")
    assert whole(chains.backup(vm)) == {}
    if running:
        vm.destroy()
    other = base.with_name("other.qcow2")
    shutil.copy2(base, other)
    # Where no probe lies: the names and stamps have to tell it.
    tool("qemu-io", "-f", "qcow2", "-c", "write -P 0x71 7M 64k", base if what == "written" else other)
    if what == "rebased":
        vm.qemu_img("rebase", "-u", "-F", "qcow2", "-b", other, disk="vda")
    elif what == "exchanged":
        exchange(base, other)
    elif what == "deep":
        then = base.stat()
        tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", other, base)
        os.utime(base, ns=(then.st_atime_ns, then.st_mtime_ns))
    if running:
        vm.start()
    vm.write("vda", "write -P 0x13 2M 64k")
    told(chains.backup(vm), "a", str(other if what in ("rebased", "deep") else base), "since the last backup")
    assert whole(chains.backup(vm)) == {}
    chains.check()


def test_data_files_of_two_disks_that_were_exchanged(lab, chains):
    vm = lab.vm(["qcow2:16", "qcow2:16"], start=False)
    data = {disk: vm.folder / f"{disk}.data" for disk in ("vda", "vdb")}
    for disk, file in data.items():
        tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={file}", vm.disk(disk), "16M")
        for made in (file, vm.disk(disk)):
            if os.geteuid() == 0:
                shutil.chown(made, vm.folder.stat().st_uid, vm.folder.stat().st_gid)
    vm.start()
    for number, disk in enumerate(data, 1):
        vm.write(disk, f"write -P {number} 0 4M")
    chains.backup(vm)
    vm.write("vda", "write -P 0x12 1M 64k")
    assert whole(chains.backup(vm)) == {}
    vm.destroy()
    exchange(*data.values())
    vm.start()
    told(chains.backup(vm), "ab", "exchanged since the last backup")
    assert whole(chains.backup(vm)) == {}
    chains.check()


@either
def test_a_base_that_was_written_and_shows_nothing_of_it(running, lab, chains):
    """Its time and size are as before: the probes tell it."""
    vm = lab.vm(["qcow2:16"], start=False)
    base = on_base(vm, "vda", "raw")
    if running:
        vm.start()
    vm.write("vda", "write -P 0x11 6M 64k")
    chains.backup(vm)
    vm.write("vda", "write -P 0x12 7M 64k")
    assert whole(chains.backup(vm)) == {}
    if running:
        vm.destroy()
    then = base.stat()
    tool("qemu-io", "-f", "raw", "-c", "write -P 0x71 0 1M", base)
    os.utime(base, ns=(then.st_atime_ns, then.st_mtime_ns))
    if running:
        vm.start()
    told(chains.backup(vm), "a", "reads otherwise")
    assert whole(chains.backup(vm)) == {}
    chains.check()


@pytest.mark.usefixtures("every_qemu_dies")
@pytest.mark.parametrize("what", ["exchanged", pytest.param("written", marks=pytest.mark.soak)])
def test_a_vm_that_is_held_by_overlays(what, lab, chains):
    vm = lab.vm(["qcow2:16", "qcow2:16"], start=False, iothread="disk")
    base = on_base(vm, "vda")
    on_base(vm, "vdb")
    vm.start()
    vm.write("vda", "write -P 0x11 0 64k")
    chains.backup(vm)
    vm.write("vda", "write -P 0x12 1M 64k")
    assert whole(chains.backup(vm)) == {}
    vm.destroy()
    if what == "exchanged":
        exchange(vm.disk("vda"), vm.disk("vdb"))
    else:
        tool("qemu-io", "-f", "qcow2", "-c", "write -P 0x71 7M 64k", base)
    vm.start()
    told(chains.backup(vm), "ab" if what == "exchanged" else "a", "disk" if what == "exchanged" else str(base))
    vm.write("vda", "write -P 0x14 3M 64k")
    assert whole(chains.backup(vm)) == {}
    chains.check()


# Overlays between backups


@either
@pytest.mark.parametrize("shape", ["raw", pytest.param("qcow2", marks=pytest.mark.soak)])
def test_an_overlay_that_was_emptied_into_its_base(shape, running, lab, chains):
    chains.settings = SNAPSHOT
    vm = lab.vm([f"{shape}:16", f"{shape}:16"], start=running)
    for disk in ("vda", "vdb"):
        vm.write(disk, "write -P 0x11 0 4M")
    chains.backup(vm)
    vm.write("vda", "write -P 0x12 1M 64k")
    assert whole(chains.backup(vm)) == {}
    vm.write("vda", "write -P 0x13 7M 64k")
    if running:
        vm.monitor("human-monitor-command", **{"command-line": "commit all"})
    else:
        tool("qemu-img", "commit", "-q", "-f", "qcow2", vm.disk("vda"))
    vm.write("vda", "write -P 0x14 8M 64k")
    recorded = chains.backup(vm)
    told(recorded, "a", "written", str(vm.folder / f"vda.{shape}"))
    vm.write("vda", "write -P 0x15 9M 64k")
    assert whole(chains.backup(vm)) == {}
    chains.check()


@pytest.mark.parametrize("how", ["made anew", pytest.param("copied", marks=pytest.mark.soak)])
def test_an_overlay_that_was_emptied_and_is_another_file_now(how, lab, chains):
    """What it said of the files below went with the file that it was."""
    chains.settings = SNAPSHOT
    vm = lab.vm(["raw:16", "raw:16"], start=False)
    vm.write("vda", "write -P 0x11 0 4M")
    chains.backup(vm)
    vm.write("vda", "write -P 0x12 1M 64k")
    assert whole(chains.backup(vm)) == {}
    overlay = vm.disk("vda")
    vm.write("vda", "write -P 0x13 7M 64k")
    tool("qemu-img", "commit", "-q", "-f", "qcow2", overlay)
    if how == "made anew":
        overlay.unlink()
        tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", vm.folder / "vda.raw", overlay)
    else:
        copy = overlay.with_name("copy")
        shutil.copyfile(overlay, copy)
        copy.rename(overlay)
    vm.write("vda", "write -P 0x14 8M 64k")
    told(chains.backup(vm), "a", "does not tell any more", str(overlay))
    vm.write("vda", "write -P 0x15 9M 64k")
    assert whole(chains.backup(vm)) == {}
    chains.check()


@either
def test_a_base_below_an_overlay_that_was_exchanged(running, lab, chains):
    chains.settings = SNAPSHOT
    vm = lab.vm(["raw:16", "raw:16"], start=running)
    vm.write("vda", "write -P 0x11 0 4M")
    vm.write("vdb", "write -P 0x21 0 4M")
    chains.backup(vm)
    vm.write("vda", "write -P 0x12 1M 64k")
    assert whole(chains.backup(vm)) == {}
    if running:
        vm.destroy()
    exchange(vm.folder / "vda.raw", vm.folder / "vdb.raw")
    if running:
        vm.start()
    told(chains.backup(vm), "ab", "since the last backup")
    assert whole(chains.backup(vm)) == {}
    chains.check()


BOTH = libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG


def test_a_disk_that_was_detached_and_attached_again_by_its_first_path(lab, chains):
    chains.settings = SNAPSHOT
    vm = lab.vm(["raw:16"])
    first = vm.folder / "sdb.raw"
    tool("qemu-img", "create", "-q", "-f", "raw", first, "16M")
    if os.geteuid() == 0:
        shutil.chown(first, vm.folder.stat().st_uid, vm.folder.stat().st_gid)

    def device(path: Path) -> str:
        return (
            f"<disk type='file' device='disk'><driver name='qemu' type='{'raw' if path == first else 'qcow2'}'/>"
            f"<source file='{path}'/><target dev='sdb' bus='scsi'/><alias name='ua-sdb'/></disk>"
        )

    vm.domain.attachDeviceFlags(device(first), BOTH)
    vm.write("vda", "write -P 0x11 0 4M")
    vm.write("sdb", "write -P 0x21 0 4M")
    chains.backup(vm)
    vm.write("sdb", "write -P 0x22 1M 64k")
    overlay = vm.disk("sdb")
    vm.domain.detachDeviceFlags(device(overlay), BOTH)
    vm.domain.attachDeviceFlags(device(first), BOTH)
    vm.write("sdb", "write -P 0x23 2M 64k")
    recorded = chains.backup(vm, warned=True)
    assert whole(recorded) == {
        "sdb": f"it lies on {first}, no longer on {overlay}, which holds what was written since the last backup"
    }
    assert str(overlay) in recorded.warnings[0]
    # And back to that overlay, which does not belong to its base any more.
    now = vm.disk("sdb")
    vm.domain.detachDeviceFlags(device(now), BOTH)
    vm.domain.attachDeviceFlags(device(overlay), BOTH)
    vm.write("sdb", "write -P 0x24 3M 64k")
    assert set(whole(chains.backup(vm))) == {"sdb"}
    chains.check()


# What does not count


def stripped(chains, *names: str) -> None:
    """Have the catalog know of the last point what an older version wrote down."""
    image = chains.images[-1]
    last = image.increments[-1]
    blank = {"marked": False, "below": None, "probes": ()}
    disks = tuple(dataclasses.replace(disk, **{name: blank[name] for name in names}) for disk in last.disks)
    increments = (*image.increments[:-1], dataclasses.replace(last, disks=disks))
    chains.images[-1] = dataclasses.replace(image, increments=increments)


@either
def test_a_backup_of_an_older_version_is_built_on_and_proved_from_then_on(running, lab, chains):
    vm = lab.vm(["qcow2:16"], start=running)
    vm.write("vda", "write -P 0x11 0 4M")
    chains.backup(vm)
    stripped(chains, "marked", "below", "probes")
    name = f"backupcore-{chains.images[-1].increments[-1].point}-vda"
    if running:
        vm.monitor("block-dirty-bitmap-remove", node=vm.node("vda"), name=name)
    else:
        vm.qemu_img("bitmap", "--remove", disk="vda", more=[name])
    vm.write("vda", "write -P 0x12 8M 64k")
    recorded = chains.backup(vm)
    assert whole(recorded) == {}
    (disk,) = recorded.increment.disks
    assert disk.marked
    assert disk.below == ()
    found = {offset for offset, _ in disk.probes}
    assert {0, 8 * MiB} <= found
    assert len([offset for offset in found if offset < 4 * MiB]) > 6, "what was there before, and is in no bitmap"
    chains.check()


def bitmaps_of(path: Path) -> list[dict[str, object]]:
    """What lies in an image that nobody has open."""
    done = subprocess.run(["qemu-img", "info", "--output=json", path], capture_output=True, check=True)
    return json.loads(done.stdout)["format-specific"]["data"].get("bitmaps", [])


@either
def test_marks_are_disabled_and_go_with_their_checkpoints(running, lab, chains, hypervisor):
    vm = lab.vm(["qcow2:16", "raw:16"], start=running)
    vm.write("vda", "write -P 0x11 0 4M")
    for _ in range(3):
        chains.backup(vm)
    points = [increment.point for increment in chains.images[-1].increments[-2:]]
    if running:
        vm.destroy()
    flags = {bitmap["name"]: bitmap["flags"] for bitmap in bitmaps_of(vm.disk("vda"))}
    assert flags == {f"backupcore-{point}{of}": [] if of else ["auto"] for point in points for of in ("", "-vda")}
    if running:
        vm.start()
    assert hypervisor.forget(vm.identity) == sorted(f"backupcore-{point}" for point in points)
    if running:
        vm.destroy()
    assert bitmaps_of(vm.disk("vda")) == []


def test_somebodys_snapshot_comes_and_goes_between_backups(lab, chains):
    """libvirt copies enabled bitmaps to the new file and back, and leaves the marks where they are."""
    vm = lab.vm(["qcow2:16"])
    vm.write("vda", "write -P 0x11 0 4M")
    chains.backup(vm)
    source = f"<source file='{vm.folder}/theirs.qcow2'/>"
    xml = f"<domainsnapshot><disks><disk name='vda'>{source}</disk></disks></domainsnapshot>"
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    vm.domain.snapshotCreateXML(xml, flags)
    vm.write("vda", "write -P 0x12 1M 64k")
    vm.commit("vda")
    vm.write("vda", "write -P 0x13 2M 64k")
    assert whole(chains.backup(vm)) == {}
    chains.check()


@pytest.mark.parametrize("size", [512, CLUSTER, 33 * MiB + 512, 1 << 35, (1 << 35) + 1024, 5 << 40])
def test_qemu_finds_the_one_bit_of_a_mark_at_the_end_of_the_disk(size, tmp_path):
    made, image = tmp_path / "made.qcow2", tmp_path / "image.qcow2"
    make_one_bit(made, size, "bit")
    tool("qemu-img", "check", "-q", made)
    tool("qemu-img", "create", "-q", "-f", "qcow2", image, size)
    merge = ["--merge", "bit", "-b", made, "-F", "qcow2"]
    tool("qemu-img", "bitmap", "--add", "--disable", *merge, "-f", "qcow2", image, "mark")
    context = "qemu:dirty-bitmap:mark"
    with (
        QemuNbd(tmp_path / "s", image, "qcow2", bitmaps=["mark"]) as server,
        Client(server.address, [context]) as client,
    ):
        last = (size - 1) // CLUSTER * CLUSTER
        assert list(dirty(client, context, 0, size)) == [(last, size - last)]


def test_owners_and_modes_of_files_below_do_not_count(tmp_path):
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", base, "1M")
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base.name, top)
    then = stamps_below(str(top), "qcow2")
    assert [stamp[0] for stamp in then] == [str(base)]
    base.chmod(0o600)
    base.read_bytes()
    assert not changed(then, stamps_below(str(top), "qcow2"))
    (path, inode, size, time) = then[0]
    assert not changed(then, [(path, 0, size, time)]), "a file system that gives a file another inode each time"
    assert "exchanged" in changed(then, [(path, inode + 1, size, time)])
    for other in ((path, inode, size + 1, time), (path, 0, size, time + 1)):
        assert "was changed" in changed(then, [other])
    assert stamps_of([("nbd://host/disk", True), ("/dev/null", True)]) == (
        ("nbd://host/disk", 0, 0, 0),
        ("/dev/null", 0, 0, 0),
    )


def test_a_bitmap_that_was_removed_from_a_file_below_is_not_called_a_write(tmp_path):
    """As when another installation tidies up: nothing proves that it was no more than that."""
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", base, "1M")
    tool("qemu-img", "bitmap", "--add", base, "theirs")
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base.name, top)
    then = stamps_below(str(top), "qcow2")
    tool("qemu-img", "bitmap", "--remove", base, "theirs")
    assert changed(then, stamps_below(str(top), "qcow2")) == (
        f"{base}, on which it lies, was changed since the last backup: something has written to it, or has added or "
        "removed a bitmap in it"
    )


def data(*ranges: tuple[int, int]) -> Layout:
    """Clusters (first, count) that hold data, of a disk of 1 TiB."""
    return Layout(1 << 40, [Extent(first * CLUSTER, count * CLUSTER, Kind.DATA) for first, count in ranges])


def test_probes_lie_at_doubling_distances_among_the_data():
    found = [offset // CLUSTER for offset in places(data((100, 8), (1000, 1000)))]
    assert found[:5] == [100, 101, 102, 104, 1000 + 0]
    assert {1999, 1998, 1997, 1995, 1991} <= set(found)
    assert len(places(data((0, 1 << 24)))) == 42
    assert places(data()) == []
    assert places(data((7, 1))) == [7 * CLUSTER]


def test_an_old_probe_stays_and_room_is_bounded():
    old = [offset * CLUSTER for offset in (10, 20, 1 << 20)]
    every = chosen(old, range(0, 1 << 31, 64 * CLUSTER))
    assert set(old) <= set(every)
    assert len(every) <= 42
    assert every[0] == 0, "the first and the last of all are among them"
    assert chosen([], []) == []
    probes = ((0, "a"), (CLUSTER, "b"), (9 * CLUSTER, "c"))
    assert carried(probes, data((1, 3))) == (probes[0], probes[2])
    assert failed(probes, {0: "a", 9 * CLUSTER: "c"}) == ""
    assert f"at byte {9 * CLUSTER} reads otherwise" in failed(probes, {0: "a", 9 * CLUSTER: "d"})
