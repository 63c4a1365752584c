"""Restore of any increment: equal to what the guest held, and no damage passes."""

from __future__ import annotations

import io
import json
import os
import stat
import struct
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import BinaryIO, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import backupcore
from backupcore import hookimpl, run_backup
from backupcore.chain import plan
from backupcore.context import Context
from backupcore.datastore import Datastore
from backupcore.disk.parallel import REQUESTS
from backupcore.errors import (
    BackupError,
    Busy,
    Cancelled,
    ConfigError,
    IntegrityError,
    NotFound,
    SourceNotFound,
    TargetFull,
)
from backupcore.manifest import NAME
from backupcore.model import VM, Artifact, BytesArtifact, Image, SourceRef, Type
from backupcore.opened import open_chain
from backupcore.restore import Form, Restored, check, onto, pour, restore
from backupcore.session import Recorded
from backupcore.testing.guest import MemoryGuest, MemoryHypervisor
from backupcore.testing.memory import MemoryDriver
from lab.host import wait_until
from lab.loop import loop_device

WEB = VM(uuid="7d1c1a4e-0000-4000-8000-000000000001", name="web1")
DB = VM(uuid="7d1c1a4e-0000-4000-8000-000000000002", name="db1")


class Site:
    """Guests, a datastore and a catalog in memory; `truth` is what each guest held at each of its increments."""

    def __init__(self, folder: Path, guests: dict[VM, dict[str, bytearray]]) -> None:
        self.folder = folder
        self.guests = {vm: MemoryGuest(vm, disks) for vm, disks in guests.items()}
        self.driver = MemoryDriver()
        self.datastore = Datastore("mem", self.driver, hypervisor=MemoryHypervisor(self.guests.values()))
        self.images: dict[VM, Image] = {}
        self.truth: dict[tuple[VM, int], dict[str, bytes]] = {}
        self._runs = 0

    @contextmanager
    def context(self) -> Iterator[Context]:
        self._runs += 1
        folder = self.folder / f"run{self._runs}"
        folder.mkdir()
        with Context(folder) as ctx:
            yield ctx

    def backup(self, vm: VM = WEB) -> None:
        def record(recorded: Recorded) -> None:
            image = self.images.get(vm)
            if image is None or recorded.run.type is Type.FULL:
                image = Image(uuid=recorded.run.image, number=1, vm=vm, datastore="mem", state="open", increments=())
            self.images[vm] = replace(image, increments=(*image.increments, recorded.increment))

        self.truth[vm, len(self.images[vm].increments) if vm in self.images else 0] = {
            name: bytes(data) for name, data in self.guests[vm].disks.items()
        }
        run = plan(self.images.get(vm), vm=vm, host="h", datastore="mem", settings={})
        with self.context() as ctx:
            run_backup(self.datastore, run, ctx, record=record)

    def restore(self, number: int | None = None, vm: VM = WEB, **how: object) -> Restored:
        to = self.folder / f"restored{self._runs}"
        to.mkdir()
        with self.context() as ctx:
            return restore(
                self.datastore, self.images[vm], number, ctx, target=lambda disk: to / f"{disk.id}.qcow2", **how
            )

    def kept(self, number: int, vm: VM = WEB) -> dict[str, bytes]:
        return self.driver.kept[self.images[vm].increments[number].source.token][1]


def raw(path: Path) -> bytes:
    """What QEMU says a disk holds."""
    check = subprocess.run(["qemu-img", "check", "-q", path], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr
    out = path.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", path, out], check=True)
    return out.read_bytes()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    random = Random(2)
    site = Site(
        tmp_path,
        {
            WEB: {"vda": bytearray(4 << 20), "vdb": bytearray(random.randbytes(1 << 20))},
            DB: {"vda": bytearray(random.randbytes(4 << 20))},
        },
    )
    guest = site.guests[WEB]
    guest.write("vda", 100_000, random.randbytes(1 << 20))
    site.backup()
    guest.write("vda", 300_000, random.randbytes(70_000))
    guest.write("vda", 131072, bytes(65536))
    site.backup()
    guest.write("vda", 5 << 20, b"the disk has grown")
    guest.write("vdb", 0, bytes(1 << 20))
    site.backup()
    return site


def test_disks_that_come_and_go_within_a_chain(tmp_path: Path):
    random = Random(3)
    site = Site(tmp_path, {WEB: {"vda": bytearray(random.randbytes(1 << 20))}})
    disks, guest = site.guests[WEB].disks, site.guests[WEB]
    site.backup()
    disks["vdb"] = bytearray(random.randbytes(1 << 20))
    guest.write("vda", 70_000, random.randbytes(70_000))
    site.backup()
    guest.write("vdb", 300_000, bytes(200_000))
    site.backup()
    taken_out = disks.pop("vdb")
    guest.write("vda", 400_000, random.randbytes(70_000))
    site.backup()
    disks["vdb"] = bytearray(taken_out[: 1 << 19])  # what was put back is shorter
    site.backup()
    guest.write("vdb", 0, random.randbytes(70_000))
    site.backup()
    whole = [{disk.id: disk.whole for disk in one.disks} for one in site.images[WEB].increments]
    assert whole == [
        {"vda": True},
        {"vda": False, "vdb": True},
        {"vda": False, "vdb": False},
        {"vda": False},
        {"vda": False, "vdb": True},
        {"vda": False, "vdb": False},
    ]
    for number in range(6):
        restored = site.restore(number)
        assert {disk.id: raw(disk.path) for disk in restored.disks} == site.truth[WEB, number]
        for disk in restored.disks:
            disk.path.unlink()
            disk.path.with_suffix(".raw").unlink()
        restored.disks[0].path.parent.rmdir()
    layers = {disk.id: [number for number, _ in disk.layers] for disk in site.restore(5).disks}
    assert layers == {"vda": [0, 1, 2, 3, 4, 5], "vdb": [4, 5]}
    manifest = json.loads(site.kept(1)[NAME])
    assert [disk["reason"] for disk in manifest["disks"]] == ["", "added since the last backup"]
    assert "memory" not in json.dumps(manifest["disks"]), "no path of a host"


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_increment_restores_to_what_the_guest_held(site: Site, number: int):
    restored = site.restore(number)
    assert restored.increment.id == number
    for disk in restored.disks:
        truth = site.truth[WEB, number][disk.id]
        assert raw(disk.path) == truth.ljust(-(-len(truth) // 512) * 512, b"\0")
        assert [one for one, _ in disk.layers] == list(range(number + 1))
    assert restored.files == {"vm.xml": b"<domain><name>web1</name></domain>"}


def test_one_disk_and_what_does_not_exist(site: Site):
    assert [disk.id for disk in site.restore(2, disks=["vdb"]).disks] == ["vdb"]
    with pytest.raises(NotFound, match="vdz"):
        site.restore(2, disks=["vdz"])
    with pytest.raises(NotFound, match="increment 9"):
        site.restore(9)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_history_of_writes_zeros_and_growth(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    random = Random(data.draw(st.integers(0, 1 << 30)))
    site = Site(tmp_path_factory.mktemp("any"), {WEB: {"vda": bytearray(data.draw(st.integers(1, 1 << 20)))}})
    guest = site.guests[WEB]
    count = data.draw(st.integers(1, 6))
    for _ in range(count):
        for _ in range(data.draw(st.integers(0, 4))):
            size = len(guest.disks["vda"])
            at, length = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, 200_000))
            grows = data.draw(st.booleans()) and size < 3 << 20
            length = length if grows else min(length, size - at)
            guest.write("vda", at, bytes(length) if data.draw(st.booleans()) else random.randbytes(length))
        site.backup()
    number = data.draw(st.integers(0, count - 1))
    disk = site.restore(number).disks[0]
    truth = site.truth[WEB, number]["vda"]
    assert raw(disk.path) == truth.ljust(-(-len(truth) // 512) * 512, b"\0")


def swap(site: Site, one: str, other: str) -> None:
    site.driver.kept[one], site.driver.kept[other] = site.driver.kept[other], site.driver.kept[one]


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGE = {
    "a source is gone": (lambda s: s.driver.kept.pop(s.images[WEB].increments[1].source.token), SourceNotFound),
    "a manifest is gone": (lambda s: s.kept(1).pop(NAME), IntegrityError),
    "a disk is gone": (lambda s: s.kept(0).pop("disk.vda.qcow2"), IntegrityError),
    "sums are gone": (lambda s: s.kept(0).pop("sums.vda"), IntegrityError),
    "two increments are exchanged": (
        lambda s: swap(s, s.images[WEB].increments[1].source.token, s.images[WEB].increments[2].source.token),
        IntegrityError,
    ),
    "another VM's backup lies there": (
        lambda s: (
            s.backup(DB),
            swap(s, s.images[WEB].increments[0].source.token, s.images[DB].increments[0].source.token),
        ),
        IntegrityError,
    ),
    "a byte of the data": (lambda s: s.kept(0).update({"disk.vda.qcow2": flip(s.kept(0)["disk.vda.qcow2"], -9)}), 0),
    "a byte of the tables": (lambda s: s.kept(0).update({"disk.vda.qcow2": flip(s.kept(0)["disk.vda.qcow2"], 3)}), 0),
    "a byte of the sums": (lambda s: s.kept(1).update({"sums.vda": flip(s.kept(1)["sums.vda"], 40)}), 0),
    "a byte of the manifest": (lambda s: s.kept(1).update({NAME: flip(s.kept(1)[NAME], 300)}), 0),
    "a byte of the definition": (lambda s: s.kept(2).update({"vm.xml": flip(s.kept(2)["vm.xml"], 3)}), 0),
    "the disk is cut": (lambda s: s.kept(0).update({"disk.vda.qcow2": s.kept(0)["disk.vda.qcow2"][:-65536]}), 0),
    "the disk goes on": (lambda s: s.kept(0).update({"disk.vda.qcow2": s.kept(0)["disk.vda.qcow2"] + b"x"}), 0),
    "a manifest of 20 MiB": (lambda s: s.kept(0).update({NAME: b" " * (20 << 20)}), 0),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_noticed_and_leaves_no_file(site: Site, what: str):
    harm, error = DAMAGE[what]
    harm(site)
    with pytest.raises(error or IntegrityError) as caught:
        site.restore(2)
    assert isinstance(caught.value, BackupError)
    assert not list(site.folder.glob("restored*/*")), "nothing that failed is published or left"


def test_increments_below_the_damage_still_restore(site: Site):
    site.kept(2).pop("disk.vda.qcow2")
    site.restore(1)


def test_nothing_is_overwritten(site: Site):
    to = site.folder / "there"
    to.mkdir()
    (to / "vdb.qcow2").write_text("precious")
    with site.context() as ctx, pytest.raises(ConfigError, match=r"vdb\.qcow2 exists"):
        restore(site.datastore, site.images[WEB], None, ctx, target=lambda disk: to / f"{disk.id}.qcow2")
    assert [path.name for path in to.iterdir()] == ["vdb.qcow2"]
    assert (to / "vdb.qcow2").read_text() == "precious"


def test_a_name_taken_while_the_restore_ran_is_not_overwritten_either(site: Site):
    to = site.folder / "race"
    to.mkdir()

    class Late:
        def phase(self, name: str, total: int | None = None) -> None:
            if name == "restore":
                (to / "vdb.qcow2").write_text("precious")

        def done(self, count: int) -> None:
            pass

    with Context(site.folder, progress=Late()) as ctx, pytest.raises(ConfigError, match=r"vdb\.qcow2 exists"):
        restore(site.datastore, site.images[WEB], None, ctx, target=lambda disk: to / f"{disk.id}.qcow2")
    assert [path.name for path in to.iterdir()] == ["vdb.qcow2"]
    assert (to / "vdb.qcow2").read_text() == "precious"


def test_a_cancelled_restore_leaves_nothing(site: Site):
    to = site.folder / "cancelled"
    to.mkdir()
    with site.context() as ctx, pytest.raises(Cancelled):
        ctx.cancel()
        restore(site.datastore, site.images[WEB], None, ctx, target=lambda disk: to / f"{disk.id}.qcow2")
    assert not list(to.iterdir())


@backupcore.driver
class ForwardDriver(MemoryDriver):
    """What it keeps can only be read forward."""

    @hookimpl
    def restore(self, source: SourceRef) -> Sequence[Artifact]:
        if source.token not in self.kept:
            raise SourceNotFound(f"no source {source}")
        return [Forward(name, data) for name, data in self.kept[source.token][1].items()]


class Forward(Artifact):
    seekable = False

    def __init__(self, name: str, data: bytes) -> None:
        self.name, self.size, self.data = name, len(data), data

    def open(self) -> BinaryIO:
        return io.BytesIO(self.data)


class Ranges(BytesArtifact):
    """It counts the bytes that are fetched from it by range."""

    fetched: ClassVar[dict[str, int]] = {}

    def read_at(self, offset: int, length: int) -> bytes:
        Ranges.fetched[self.name] = Ranges.fetched.get(self.name, 0) + length
        return super().read_at(offset, length)


@backupcore.driver
class RangesDriver(MemoryDriver):
    @hookimpl
    def restore(self, source: SourceRef) -> Sequence[Artifact]:
        return [Ranges(name, data) for name, data in self.kept[source.token][1].items()]


def over(site: Site, driver: type[MemoryDriver]) -> Site:
    """The same backups, kept by another driver."""
    site.driver = driver(kept=site.driver.kept)
    site.datastore = Datastore("mem", site.driver, hypervisor=MemoryHypervisor(site.guests.values()))
    return site


class Meeting(BytesArtifact):
    """Its manifests are opened by as many threads as have a place at the table, and not by fewer."""

    table: ClassVar[threading.Barrier]

    def open(self) -> BinaryIO:
        if self.name == NAME and json.loads(self.data)["number"]:
            self.table.wait()
        return super().open()


class ForwardMeeting(Meeting):
    seekable = False


class MeetingDriver(MemoryDriver):
    @hookimpl
    def restore(self, source: SourceRef) -> Sequence[Artifact]:
        return [Meeting(name, data) for name, data in self.kept[source.token][1].items()]


class ForwardMeetingDriver(MemoryDriver):
    @hookimpl
    def restore(self, source: SourceRef) -> Sequence[Artifact]:
        return [ForwardMeeting(name, data) for name, data in self.kept[source.token][1].items()]


DRIVERS = [MemoryDriver, ForwardDriver]


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_raw_files_are_what_the_guest_held_and_sparse(site: Site, number: int, driver: type[MemoryDriver]):
    for disk in over(site, driver).restore(number, form="raw").disks:
        truth = site.truth[WEB, number][disk.id]
        assert disk.path.read_bytes() == truth
        assert disk.path.stat().st_blocks * 512 <= sum(
            65536 for at in range(0, len(truth), 65536) if truth[at : at + 65536].strip(b"\0")
        )


@pytest.mark.parametrize(("driver", "at_once"), [(MeetingDriver, REQUESTS), (ForwardMeetingDriver, 1)])
def test_a_chain_is_opened_several_increments_at_once_where_the_store_can_seek(
    site: Site, driver: type[MemoryDriver], at_once: int
):
    for number in range(6):
        site.guests[WEB].write("vda", number << 16, b"again")
        site.backup()
    increments = site.images[WEB].increments
    assert len(increments) == 1 + 2 * REQUESTS
    Meeting.table = threading.Barrier(at_once, timeout=30)
    with over(site, driver).context() as ctx:
        opened = open_chain(site.datastore, site.images[WEB], increments, ctx)
    assert [one.increment for one in opened] == list(increments)


def test_the_first_increment_that_is_wrong_is_named(site: Site):
    for number in range(9):
        site.guests[WEB].write("vda", number << 16, b"again")
        site.backup()
    increments = site.images[WEB].increments
    for bad in (5, 3, 8):
        files = site.driver.kept[increments[bad].source.token][1]
        files[NAME] = files[NAME].replace(b'"number": ', b'"number":  ')
    with site.context() as ctx, pytest.raises(IntegrityError, match="increment 3 .* not the backup that was recorded"):
        open_chain(site.datastore, site.images[WEB], increments, ctx)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_qcow2_from_every_kind_of_store(site: Site, number: int, driver: type[MemoryDriver]):
    for disk in over(site, driver).restore(number).disks:
        truth = site.truth[WEB, number][disk.id]
        assert raw(disk.path) == truth.ljust(-(-len(truth) // 512) * 512, b"\0")


def test_of_a_store_that_can_seek_only_the_ranges_that_win_are_fetched(site: Site):
    over(site, RangesDriver)
    Ranges.fetched.clear()
    site.restore(2, disks=["vdb"])
    assert Ranges.fetched.get("disk.vdb.qcow2", 0) == 0, "the last increment has made zeros of all of it"
    Ranges.fetched.clear()
    site.restore(2, disks=["vda"])
    clusters = {at // 65536 for at in range(100_000, 100_000 + (1 << 20))} | {(5 << 20) // 65536}
    # ... and the one cluster between two of them that has been zeroed since: cheaper than a second request
    assert Ranges.fetched["disk.vda.qcow2"] <= (len(clusters) + 2) * 65536


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_one_disk_to_a_stream(site: Site, driver: type[MemoryDriver], form: Form):
    over(site, driver)
    path = site.folder / "stream.qcow2"
    with site.context() as ctx, path.open("wb") as out:
        pour(site.datastore, site.images[WEB], 1, ctx, disk="vda", out=out, form=form)
    truth = site.truth[WEB, 1]["vda"]
    assert (path.read_bytes() if form == "raw" else raw(path)) == truth


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_long_chain_to_a_stream_and_to_files(tmp_path: Path, driver: type[MemoryDriver]):
    random = Random(5)
    site = over(Site(tmp_path, {WEB: {"vda": bytearray(random.randbytes(1 << 20))}}), driver)
    for _ in range(12):
        site.guests[WEB].write("vda", random.randrange(1 << 20), random.randbytes(3000))
        site.backup()
    path = site.folder / "stream"
    with site.context() as ctx, path.open("wb") as out:
        pour(site.datastore, site.images[WEB], None, ctx, disk="vda", out=out, form="raw")
        assert (ctx.folder / "staged").exists() is (driver is ForwardDriver)
    assert path.read_bytes() == site.truth[WEB, 11]["vda"]


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("what", ["a byte of the data", "the disk is cut", "sums are gone"])
def test_damage_is_noticed_by_whatever_way_it_is_read(site: Site, what: str, driver: type[MemoryDriver]):
    over(site, driver)
    with site.context() as ctx:
        assert check(site.datastore, site.images[WEB], 2, ctx).increment.id == 2
    DAMAGE[what][0](site)
    with site.context() as ctx, pytest.raises(IntegrityError):
        check(site.datastore, site.images[WEB], 2, ctx)
    with pytest.raises(IntegrityError):
        site.restore(2, form="raw")
    assert not list(site.folder.glob("restored*/*"))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid():
        pytest.skip("only root can mount")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_target_without_room_is_told_before_anything_is_written(site: Site, small: Path, driver: type[MemoryDriver]):
    over(site, driver)
    with site.context() as ctx, pytest.raises(TargetFull, match="the disks need"):
        restore(site.datastore, site.images[WEB], 0, ctx, target=lambda disk: small / f"{disk.id}.qcow2")
    assert list(small.iterdir()) == []


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_target_that_fills_up_meanwhile_is_told_and_nothing_is_left(site: Site, small: Path, form: Form):
    class Filling:
        def phase(self, name: str, total: int | None = None) -> None:
            if name == "restore":
                (small / "somebody else's").write_bytes(bytes(3 << 19))

        def done(self, count: int) -> None:
            pass

    with Context(site.folder, progress=Filling()) as ctx, pytest.raises(TargetFull):
        restore(
            site.datastore,
            site.images[WEB],
            1,
            ctx,
            target=lambda disk: small / f"{disk.id}.qcow2",
            disks=["vdb"],
            form=form,
        )
    assert [path.name for path in small.iterdir()] == ["somebody else's"]


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A block device of 8 MiB that holds zeros."""
    with loop_device(tmp_path / "device", bytes(8 << 20), "--partscan") as made:
        yield made


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_disk_goes_onto_a_block_device(site: Site, device: Path, driver: type[MemoryDriver]):
    over(site, driver)
    with site.context() as ctx:
        onto(site.datastore, site.images[WEB], 1, ctx, disk="vda", device=device)
    truth = site.truth[WEB, 1]["vda"]
    assert device.read_bytes()[: len(truth)] == truth
    with site.context() as ctx, pytest.raises(ConfigError, match="not empty"):
        onto(site.datastore, site.images[WEB], 0, ctx, disk="vdb", device=device)
    assert device.read_bytes()[: len(truth)] == truth, "refused before anything was written"
    with site.context() as ctx:
        onto(site.datastore, site.images[WEB], 2, ctx, disk="vdb", device=device, overwrite=True)
    assert device.read_bytes()[: 1 << 20] == site.truth[WEB, 2]["vdb"], "zeros over what was there"


def test_a_device_that_cannot_be_written_to(site: Site, device: Path):
    subprocess.run(["mkfs.ext4", "-q", device], check=True, capture_output=True)
    place = site.folder / "mounted"
    place.mkdir()
    subprocess.run(["mount", device, place], check=True)
    try:
        with site.context() as ctx, pytest.raises(Busy, match="in use"):
            onto(site.datastore, site.images[WEB], 0, ctx, disk="vdb", device=device, overwrite=True)
    finally:
        subprocess.run(["umount", place], check=True)
    site.guests[WEB].write("vda", 9 << 20, b"larger than the device")
    site.backup()
    with site.context() as ctx, pytest.raises(ConfigError, match="8388608 bytes"):
        onto(site.datastore, site.images[WEB], 3, ctx, disk="vda", device=device, overwrite=True)
    with site.context() as ctx, pytest.raises(ConfigError, match="no block device"):
        onto(site.datastore, site.images[WEB], 0, ctx, disk="vdb", device=site.folder / "device")


def test_a_device_that_a_qemu_writes_to_is_refused_whoever_started_it(site: Site, device: Path, tmp_path: Path):
    socket = tmp_path / "nbd"
    command = ["qemu-nbd", "--persistent", "--format=raw", f"--socket={socket}"]
    for option, refused in ([], True), (["--read-only"], False):
        with subprocess.Popen([*command, *option, str(device)]) as other:
            try:
                wait_until(socket.exists, "qemu-nbd's socket")
                with site.context() as ctx, ExitStack() as stack:
                    if refused:
                        stack.enter_context(pytest.raises(Busy, match=rf"open for writing in qemu-nbd \({other.pid}\)"))
                    onto(site.datastore, site.images[WEB], 1, ctx, disk="vda", device=device)
                assert bool(device.read_bytes().strip(b"\0")) is not refused
            finally:
                other.terminate()
        socket.unlink(missing_ok=True)


def test_a_partition_is_in_use_where_its_disk_is_and_a_disk_where_its_partition_is(
    site: Site, device: Path, request: pytest.FixtureRequest
):
    # Debian 13 has no addpart; partx adds what a partition table says, which is then gone again. Its form: an entry of
    # 16 bytes at 446, with type, first sector and length of the partition, and a signature at 510.
    entry = struct.pack("<8xII", 2048, (6 << 20) // 512)
    table = bytes(446) + entry[:4] + b"\x83" + entry[5:] + bytes(48) + b"\x55\xaa"
    device.write_bytes(table)
    subprocess.run(["partx", "--add", device], check=True)
    device.write_bytes(bytes(len(table)))
    partition = device.with_name(f"{device.name}p1")
    if not partition.exists():  # where /dev is no devtmpfs, nobody makes the node
        numbers = Path("/sys/class/block", partition.name, "dev").read_text().split(":")
        os.mknod(partition, stat.S_IFBLK | 0o600, os.makedev(*map(int, numbers)))
        request.addfinalizer(partition.unlink)
    for target, open_elsewhere in ((partition, device), (device, partition)):
        with open_elsewhere.open("r+b") as held, site.context() as ctx:
            other = subprocess.Popen(["sleep", "60"], stdout=held)
            try:
                with pytest.raises(Busy, match=rf"open for writing in sleep \({other.pid}\)"):
                    onto(site.datastore, site.images[WEB], 1, ctx, disk="vda", device=target)
            finally:
                other.kill()
                other.wait()
        assert not device.read_bytes().strip(b"\0")
    with site.context() as ctx:
        onto(site.datastore, site.images[WEB], 1, ctx, disk="vda", device=partition)
    truth = site.truth[WEB, 1]["vda"]
    assert partition.read_bytes()[: len(truth)] == truth


def test_a_restore_onto_a_device_that_fails_leaves_no_disk_there(site: Site, device: Path):
    DAMAGE["a byte of the data"][0](site)
    with site.context() as ctx, pytest.raises(IntegrityError):
        onto(site.datastore, site.images[WEB], 2, ctx, disk="vda", device=device)
    assert not device.read_bytes()[:65536].strip(b"\0")


@pytest.mark.soak
@pytest.mark.parametrize("driver", DRIVERS)
def test_a_chain_of_200_needs_few_descriptors(tmp_path: Path, driver: type[MemoryDriver]):
    random = Random(6)
    site = over(Site(tmp_path, {WEB: {"vda": bytearray(random.randbytes(4 << 20))}}), driver)
    for _ in range(200):
        site.guests[WEB].write("vda", random.randrange(4 << 20), random.randbytes(3000))
        site.backup()
    before = len(list(Path("/proc/self/fd").iterdir()))
    most = 0

    class Counting:
        def phase(self, name: str, total: int | None = None) -> None:
            pass

        def done(self, count: int) -> None:
            nonlocal most
            most = max(most, len(list(Path("/proc/self/fd").iterdir())) - before)

    path = tmp_path / "vda.raw"
    with Context(tmp_path, progress=Counting()) as ctx:
        restore(site.datastore, site.images[WEB], None, ctx, target=lambda disk: path, form="raw")
    assert path.read_bytes() == site.truth[WEB, 199]["vda"]
    assert 0 < most <= 16
