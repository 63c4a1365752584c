"""Flatten: the result restores to what every remaining point held, in any layout, and no damage passes into it."""

from __future__ import annotations

import io
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import BinaryIO

import pytest
from blake3 import blake3

import backupcore
from backupcore import hookimpl, run_backup
from backupcore import manifest as manifests
from backupcore.chain import plan
from backupcore.context import Context
from backupcore.datastore import Datastore
from backupcore.disk.extents import CLUSTER
from backupcore.errors import (
    BackupError,
    Cancelled,
    ConfigError,
    ContractViolation,
    IntegrityError,
    SourceNotFound,
    TargetFull,
    TargetUnavailable,
)
from backupcore.flatten import Flattened, find, flatten
from backupcore.merging import MOST_DEAD, MOST_STREAMS
from backupcore.model import (
    VM,
    Artifact,
    BackupRun,
    BytesArtifact,
    Image,
    Merge,
    SourceRef,
    Stored,
    Type,
    Usage,
)
from backupcore.restore import restore
from backupcore.session import Recorded
from backupcore.testing.guest import MemoryGuest, MemoryHypervisor
from backupcore.testing.memory import CopyingMemoryDriver, MemoryDriver

WEB = VM(uuid="7d1c1a4e-0000-4000-8000-000000000001", name="web1")


class Stream(Artifact):
    """An artifact that can only be read forward; it counts how many of its kind are open, and how often it was."""

    seekable = False
    open_now = most_open = 0
    opened: dict[tuple[str, str], int] = {}  # noqa: RUF012 - one tally for all

    def __init__(self, token: str, name: str, data: bytes) -> None:
        self.token, self.name, self.data = token, name, data
        self.size = len(data)

    def open(self) -> BinaryIO:
        return Counted(self)


class Counted(io.BytesIO):
    def __init__(self, artifact: Stream) -> None:
        super().__init__(artifact.data)
        Stream.open_now += 1
        Stream.most_open = max(Stream.most_open, Stream.open_now)
        key = artifact.token, artifact.name
        Stream.opened[key] = Stream.opened.get(key, 0) + 1

    def close(self) -> None:
        if not self.closed:
            Stream.open_now -= 1
        super().close()


@backupcore.driver
class StreamDriver(MemoryDriver):
    """What it keeps can only be read forward, as with ``restic dump``."""

    @hookimpl
    def restore(self, source: SourceRef) -> Sequence[Artifact]:
        if source.token not in self.kept:
            raise SourceNotFound(f"no source {source}")
        return [
            Stream(source.token, name, data) if name.startswith("disk.") else BytesArtifact(name, data)
            for name, data in self.kept[source.token][1].items()
        ]


class Site:
    """One guest, a datastore and a catalog in memory; `truth` is what the guest held at each of its increments."""

    def __init__(self, folder: Path, driver: MemoryDriver, disks: dict[str, bytearray]) -> None:
        self.folder = folder
        self.driver = driver
        self.guest = MemoryGuest(WEB, disks)
        self.hypervisor = MemoryHypervisor([self.guest])
        self.datastore = Datastore("mem", driver, hypervisor=self.hypervisor)
        self.image: Image | None = None
        self.truth: dict[int, dict[str, bytes]] = {}
        self._runs = 0

    def context(self, name: str = "run") -> Context:
        self._runs += 1
        folder = self.folder / f"{name}{self._runs}"
        folder.mkdir()
        return Context(folder)

    def backup(self) -> None:
        def record(recorded: Recorded) -> None:
            image = self.image or Image(
                uuid=recorded.run.image, number=1, vm=WEB, datastore="mem", state="open", increments=()
            )
            self.image = replace(image, increments=(*image.increments, recorded.increment))

        run = plan(self.image, vm=WEB, host="h", datastore="mem", settings={})
        self.truth[run.number] = {name: bytes(data) for name, data in self.guest.disks.items()}
        with self.context() as ctx:
            run_backup(self.datastore, run, ctx, record=record)

    def flatten(self, to: int, **how: object) -> Flattened:
        assert self.image
        with self.context() as ctx:
            done = flatten(self.datastore, self.image, to, ctx, host="h", **how)
            self.record(done)
            self.datastore.delete([one.source for one in reversed(done.replaces)], ctx)
        return done

    def record(self, done: Flattened) -> None:
        assert self.image
        kept = [one for one in self.image.increments if one not in done.replaces]
        self.image = replace(self.image, increments=(done.increment, *kept), began=done.began)

    def ids(self) -> list[tuple[int, int, str]]:
        assert self.image
        return [(one.id, one.pid, one.type.letter) for one in self.image.increments]

    def check(self) -> None:
        """Every increment that is there restores to what the guest held, as QEMU reads it."""
        assert self.image
        for increment in self.image.increments:
            to = self.folder / f"restored{self._runs}-{increment.id}"
            to.mkdir()
            with self.context() as ctx:
                made = restore(
                    self.datastore, self.image, increment.id, ctx, target=lambda disk, to=to: to / f"{disk.id}.qcow2"
                )
            assert {disk.id: raw(disk.path) for disk in made.disks} == self.truth[increment.id]
            for source in self.driver.kept.values():
                for name, data in source[1].items():
                    if name.startswith("disk."):
                        check_qcow2(self.folder, data)

    def kept(self, number: int) -> dict[str, bytes]:
        assert self.image
        found = next(one for one in self.image.increments if one.id == number)
        return self.driver.kept[found.source.token][1]


def raw(path: Path) -> bytes:
    out = path.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", path, out], check=True)
    return out.read_bytes()


CHECKED: set[bytes] = set()


def check_qcow2(folder: Path, data: bytes) -> None:
    """``qemu-img check`` finds nothing, not even a leak."""
    digest = blake3(data).digest()
    if digest in CHECKED:
        return
    CHECKED.add(digest)
    path = folder / "checked.qcow2"
    path.write_bytes(data)
    found = subprocess.run(["qemu-img", "check", path], capture_output=True, text=True, check=False)
    assert (found.returncode, "No errors were found" in found.stdout) == (0, True), found.stdout + found.stderr


def scribble(guest: MemoryGuest, random: Random) -> None:
    """A night's work: data, zeros, a disk that grows now and then."""
    for name, data in guest.disks.items():
        for _ in range(random.randint(0, 3)):
            offset = random.randrange(0, len(data) - 1)
            length = min(random.choice([100, CLUSTER, 3 * CLUSTER + 17]), len(data) - offset)
            guest.write(name, offset, bytes(length) if random.random() < 0.3 else random.randbytes(length))
        if random.random() < 0.15:
            guest.write(name, len(data) + random.choice([0, 512, 5 * CLUSTER]), random.randbytes(512))


DRIVERS = [MemoryDriver, CopyingMemoryDriver, StreamDriver]


@pytest.fixture(params=DRIVERS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Site:
    random = Random(3)
    made = Site(
        tmp_path,
        request.param(),
        {"vda": bytearray(random.randbytes(2 << 20) + bytes(1 << 20)), "vdb": bytearray(random.randbytes(700 * 512))},
    )
    made.backup()
    for _ in range(4):
        scribble(made.guest, random)
        made.backup()
    return made


def test_the_oldest_become_a_full_with_the_id_and_point_of_the_last(site: Site):
    before = site.image.increments
    done = site.flatten(2)
    assert site.ids() == [(2, -1, "F"), (3, 2, "I"), (4, 3, "I")]
    full = site.image.increments[0]
    assert (full.point, full.date, full.consistency) == (before[2].point, before[2].date, before[2].consistency)
    assert full.reason == "flattened: increments 0 to 2"
    assert done.began == before[0].date
    assert done.copied is isinstance(site.driver, CopyingMemoryDriver)
    manifest = manifests.parse(site.kept(2)["manifest.json"], "")
    assert manifest.replaces == tuple(one.point for one in before[:3])
    assert (manifest.stands_for, manifest.parent, manifest.began) == (
        before[2].digest,
        None,
        manifests.parse(site.kept(2)["manifest.json"], "").began,
    )
    assert {part.order for part in manifest.disks} == {"file" if done.copied else "guest"}
    assert len(site.driver.kept) == 3
    site.check()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("driver", DRIVERS)
def test_nights_without_end(driver: type[MemoryDriver], seed: int, tmp_path: Path):
    """KEEP_LAST=3 for weeks: every point that is kept restores, whatever was flattened over whatever."""
    random = Random(seed)
    site = Site(tmp_path, driver(), {"vda": bytearray(random.randbytes(20 * CLUSTER) + bytes(13 * CLUSTER))})
    orders = set()
    for night in range(14):
        if night:
            scribble(site.guest, random)
        site.backup()
        if len(site.image.increments) > 3:
            site.flatten(site.image.increments[-3].id)
            assert [one.id for one in site.image.increments] == [night - 2, night - 1, night]
            manifest = manifests.parse(site.kept(night - 2)["manifest.json"], "")
            orders |= {part.order for part in manifest.disks}
    site.check()
    assert site.image.increments[0].type is Type.FULL
    if driver is CopyingMemoryDriver:
        assert orders == {"file", "guest"}, "dead clusters are cleared away once they are too many"


def test_all_of_an_image_can_become_one_full_and_the_next_increment_builds_on_it(site: Site):
    while len(site.image.increments) > 1:  # N=1; a store that is read forward needs two steps
        site.flatten(4)
    assert site.ids() == [(4, -1, "F")]
    scribble(site.guest, Random(9))
    site.backup()
    assert site.ids() == [(4, -1, "F"), (5, 4, "I")]
    site.check()
    site.flatten(5)
    site.check()


def test_the_smaller_of_two_sizes_cuts_and_zeros_follow(tmp_path: Path):
    """A disk that shrank and grew: bytes past the smaller end are gone, though an older layer still has them."""
    for driver in (MemoryDriver(), CopyingMemoryDriver()):
        folder = tmp_path / type(driver).__name__
        folder.mkdir()
        site = Site(folder, driver, {"vda": bytearray(b"x" * 8 * CLUSTER)})
        site.backup()
        for size in (5 * CLUSTER + 1024, 8 * CLUSTER):
            data = site.guest.disks["vda"]
            del data[size:]
            data.extend(bytes(size - len(data)))
            site.guest.write("vda", 0, b"y" * 100)
            site.backup()
        site.check()
        assert not site.flatten(2).copied, "a cluster that is cut is none that a store could copy"
        site.check()


def test_a_disk_that_came_later_and_one_that_went(site: Site):
    del site.guest.disks["vdb"]
    site.backup()
    while site.image.increments[0].id < 5:
        site.flatten(5)
    assert [disk.id for disk in site.image.increments[0].disks] == ["vda"]
    assert "disk.vdb.qcow2" not in site.kept(5)
    site.check()


def test_a_long_chain_that_is_read_forward_takes_steps_of_few_open_layers(tmp_path: Path):
    random = Random(5)
    site = Site(tmp_path, StreamDriver(), {"vda": bytearray(random.randbytes(40 * CLUSTER))})
    for _ in range(20):
        site.backup()
        scribble(site.guest, random)
    Stream.most_open = Stream.open_now = 0
    steps = []
    while len(site.image.increments) > 1:
        Stream.opened.clear()
        site.flatten(19)
        steps.append(site.image.increments[0].id)
        assert max(Stream.opened.values()) <= 3, "tables, data, and the proof: no layer is read again and again"
    assert steps == [7, 14, 19]
    assert Stream.most_open <= MOST_STREAMS
    assert Stream.open_now == 0
    site.check()


def test_a_long_chain_that_can_be_seeked_takes_one_step(tmp_path: Path):
    random = Random(5)
    site = Site(tmp_path, MemoryDriver(), {"vda": bytearray(random.randbytes(40 * CLUSTER))})
    for _ in range(20):
        site.backup()
        scribble(site.guest, random)
    site.flatten(19)
    assert site.ids() == [(19, -1, "F")]
    site.check()


def damage(site: Site, number: int, name: str, at: int) -> None:
    found = next(one for one in site.image.increments if one.id == number)
    files = site.driver.kept[found.source.token][1]
    data = bytearray(files[name])
    data[at] ^= 1
    files[name] = bytes(data)


@pytest.mark.parametrize(
    ("number", "name", "at", "word"),
    [
        (0, "disk.vda.qcow2", -CLUSTER, "data cluster"),
        (1, "manifest.json", -9, "is not the backup that was recorded|not a manifest"),
        (0, "sums.vda", 3, "not what was written"),
        (2, "disk.vda.qcow2", 4, "header"),
        (2, "vm.xml", 4, "vm.xml was changed"),
    ],
)
@pytest.mark.parametrize("driver", [MemoryDriver, StreamDriver])
def test_no_damage_is_carried_over(driver, number: int, name: str, at: int, word: str, tmp_path: Path):
    random = Random(1)
    site = Site(tmp_path, driver(), {"vda": bytearray(random.randbytes(20 * CLUSTER))})
    for _ in range(3):
        site.backup()
        site.guest.write("vda", 5 * CLUSTER, random.randbytes(2 * CLUSTER))
    damage(site, number, name, at)
    before = dict(site.driver.kept)
    with pytest.raises(IntegrityError, match=word):
        site.flatten(2)
    assert site.driver.kept == before, "nothing new, and nothing less"
    assert len(site.image.increments) == 3


def test_damage_where_the_store_copies_is_found_where_it_is_read_back(tmp_path: Path):
    random = Random(1)
    site = Site(tmp_path, CopyingMemoryDriver(), {"vda": bytearray(random.randbytes(20 * CLUSTER))})
    for _ in range(3):
        site.backup()
        site.guest.write("vda", 5 * CLUSTER, random.randbytes(2 * CLUSTER))
    damage(site, 0, "disk.vda.qcow2", -CLUSTER)
    before = dict(site.driver.kept)
    with pytest.raises(IntegrityError, match="data cluster 19 is not"):
        site.flatten(2, everything=True)
    assert site.driver.kept == before


def test_a_result_that_is_not_what_was_sent_is_taken_back(tmp_path: Path):
    @backupcore.driver
    class Lossy(MemoryDriver):
        @hookimpl
        def backup(self, artifacts: Sequence[Artifact], run: BackupRun, ctx: Context) -> Stored:
            stored = MemoryDriver.backup(self, artifacts, run, ctx)
            if run.builds_on and run.type is Type.FULL:
                files = self.kept[stored.source.token][1]
                files["sums.vda"] = files["sums.vda"][:-1] + b"\0"
            return stored

    site = Site(tmp_path, Lossy(), {"vda": bytearray(b"x" * 20 * CLUSTER)})
    site.backup()
    site.guest.write("vda", 0, b"y")
    site.backup()
    before = dict(site.driver.kept)
    with pytest.raises(IntegrityError):
        site.flatten(1)
    assert site.driver.kept == before


def test_a_driver_that_does_not_read_all_is_found_out(tmp_path: Path):
    @backupcore.driver
    class Hasty(MemoryDriver):
        @hookimpl
        def backup(self, artifacts: Sequence[Artifact], run: BackupRun, ctx: Context) -> Stored:
            if not run.builds_on or run.type is not Type.FULL:
                return MemoryDriver.backup(self, artifacts, run, ctx)
            return MemoryDriver.backup(self, [one for one in artifacts if one.name == "vm.xml"], run, ctx)

    site = Site(tmp_path, Hasty(), {"vda": bytearray(b"x" * 20 * CLUSTER)})
    site.backup()
    site.guest.write("vda", 0, b"y")
    site.backup()
    with pytest.raises(ContractViolation, match="has not read all"):
        site.flatten(1)
    assert site.ids() == [(0, -1, "F"), (1, 0, "I")]


def test_room_is_looked_at_first(tmp_path: Path):
    @backupcore.driver
    class Small(MemoryDriver):
        @hookimpl
        def usage(self) -> Usage:
            return Usage(free=CLUSTER)

    site = Site(tmp_path, Small(), {"vda": bytearray(b"x" * 20 * CLUSTER)})
    site.backup()
    site.guest.write("vda", 0, b"y")
    site.backup()
    with pytest.raises(TargetFull, match="are free"):
        site.flatten(1)
    assert len(site.driver.kept) == 2
    site.flatten(1, room=100)
    site.check()


def test_there_is_nothing_to_merge_below_a_full(site: Site):
    with pytest.raises(ConfigError, match="nothing to merge"):
        site.flatten(0)


def test_a_cancel_leaves_everything_as_it_was(site: Site):
    before = dict(site.driver.kept)

    class Stop:
        def __init__(self, ctx: Context) -> None:
            self.ctx = ctx

        def phase(self, name: str, total: int | None = None) -> None:
            if name == "flatten":
                self.ctx.cancel()

        def done(self, count: int) -> None:
            pass

    with site.context() as ctx:
        ctx.progress = Stop(ctx)
        with pytest.raises(Cancelled):
            flatten(site.datastore, site.image, 2, ctx, host="h")
    assert site.driver.kept == before


def test_a_layer_that_hangs_ends_with_a_cancel(tmp_path: Path):
    """What ends the read is registered after the merge's own end, which must not wait for it."""
    hangs = threading.Event()

    class Hanging(io.BytesIO):
        def __init__(self, data: bytes) -> None:
            super().__init__(data)
            self.ended = threading.Event()

        def read(self, length: int | None = -1, /) -> bytes:
            if self.tell() >= 6 * CLUSTER:
                hangs.set()
                assert self.ended.wait(60)
                raise TargetUnavailable("its program was ended")
            return super().read(length)

    class Layer(Stream):
        def __init__(self, data: bytes, ctx: Context) -> None:
            super().__init__("token", "disk.vda.qcow2", data)
            self.ctx = ctx

        def open(self) -> BinaryIO:
            made = Hanging(self.data)
            self.ctx.stack.enter_context(self.ctx.on_cancel(made.ended.set))
            return made

    @backupcore.driver
    class Stuck(MemoryDriver):
        @hookimpl
        def restore(self, source: SourceRef, ctx: Context) -> Sequence[Artifact]:
            return [
                Layer(data, ctx) if name.startswith("disk.") else BytesArtifact(name, data)
                for name, data in self.kept[source.token][1].items()
            ]

    site = Site(tmp_path, Stuck(), {"vda": bytearray(Random(1).randbytes(60 * CLUSTER))})
    for _ in range(2):
        site.backup()
        site.guest.write("vda", 0, b"y")
    with site.context() as ctx:
        canceller = threading.Thread(target=lambda: hangs.wait(60) and ctx.cancel())
        canceller.start()
        with pytest.raises(Cancelled):
            flatten(site.datastore, site.image, 1, ctx, host="h")
        canceller.join(60)
        assert not canceller.is_alive()
    assert len(site.driver.kept) == 2


def test_a_result_that_nobody_recorded_is_found_again(site: Site):
    with site.context() as ctx:
        done = flatten(site.datastore, site.image, 2, ctx, host="h")
    known = [one.source for one in site.image.increments]
    with site.context() as ctx:
        found = find(site.datastore, site.image, known, ctx)
    assert (found.increment, found.replaces, found.began) == (done.increment, done.replaces, done.began)
    damaged = site.driver.kept[done.increment.source.token][1]
    damaged["sums.vda"] = damaged["sums.vda"][:-1] + b"\0"
    with site.context() as ctx:
        assert find(site.datastore, site.image, known, ctx) is None
    assert done.increment.source.token in site.driver.kept, "it is left, for a person to look at"


def test_a_full_that_stands_for_another_increment_is_no_parent(site: Site):
    """The child's link holds through `stands_for` only for the point that it was taken against."""
    site.flatten(2)
    files = site.kept(2)
    text = files["manifest.json"].replace(site.image.increments[0].point.encode(), b"f" * 32)
    site.driver.kept[site.image.increments[0].source.token][1]["manifest.json"] = text
    forged = replace(site.image.increments[0], digest=blake3(text).hexdigest(), point="f" * 32)
    site.image = replace(site.image, increments=(forged, *site.image.increments[1:]))
    with site.context() as ctx, pytest.raises(IntegrityError, match="does not build on"):
        restore(site.datastore, site.image, 3, ctx, target=lambda disk: site.folder / "x.qcow2")


def test_a_driver_that_answers_with_an_old_source_is_refused(tmp_path: Path):
    @backupcore.driver
    class Lazy(MemoryDriver):
        @hookimpl
        def flatten(self, merge: Merge) -> Stored:
            for artifact in merge.artifacts:
                artifact.open().read()
            return Stored(source=merge.sources[0])

    site = Site(tmp_path, Lazy(), {"vda": bytearray(b"x" * 20 * CLUSTER)})
    site.backup()
    site.guest.write("vda", 0, b"y")
    site.backup()
    with pytest.raises(BackupError, match="one of those that were merged"):
        site.flatten(1)
    assert len(site.driver.kept) == 2


def test_a_driver_that_reads_instead_of_copying_gets_the_same_bytes(site: Site):
    """What a store is sent because it is too small to copy is read from the artifact, and held against its digests."""
    seen = {}

    @backupcore.driver
    class Reading(CopyingMemoryDriver):
        @hookimpl
        def flatten(self, merge: Merge, run: BackupRun, ctx: Context) -> Stored | None:
            stored = CopyingMemoryDriver.flatten(self, merge, run, ctx)
            for artifact in merge.artifacts:
                made = self.kept[stored.source.token][1][artifact.name]
                with artifact.open() as file:
                    seen[artifact.name] = file.read() == made
                assert artifact.read_at(70_000, 100_001) == made[70_000:170_001]
            return stored

    if not isinstance(site.driver, CopyingMemoryDriver):
        return
    site.datastore = Datastore("mem", Reading(kept=site.driver.kept), hypervisor=site.hypervisor)
    assert site.flatten(2).copied
    assert seen
    assert all(seen.values())


def test_the_share_of_dead_clusters_stays_bounded(tmp_path: Path):
    site = Site(tmp_path, CopyingMemoryDriver(), {"vda": bytearray(Random(1).randbytes(100 * CLUSTER))})
    site.backup()
    shares = []
    for night in range(12):
        site.guest.write("vda", night * 7 * CLUSTER, Random(night).randbytes(7 * CLUSTER))
        site.backup()
        site.flatten(night + 1)
        part = manifests.parse(site.kept(night + 1)["manifest.json"], "").disks[0]
        clusters = len(site.kept(night + 1)[part.sums]) // 32
        shares.append((clusters - 100) / clusters)
    assert max(shares) <= MOST_DEAD
    assert max(shares) > MOST_DEAD / 2
    site.check()


@pytest.mark.soak
def test_a_chain_of_200_is_flattened_in_linear_time(tmp_path: Path):
    """Twice the increments take about twice the time; layers that can be seeked are all merged in one step."""
    taken = {}
    for length in (50, 100, 200):
        folder = tmp_path / str(length)
        folder.mkdir()
        random = Random(length)
        site = Site(folder, MemoryDriver(), {"vda": bytearray(random.randbytes(64 * CLUSTER))})
        for _ in range(length):
            site.backup()
            for _ in range(8):
                site.guest.write("vda", random.randrange(64) * CLUSTER, random.randbytes(CLUSTER))
        started = time.process_time()
        site.flatten(length - 1)
        taken[length] = time.process_time() - started
        assert site.ids() == [(length - 1, -1, "F")]
    site.check()
    assert taken[200] < 8 * taken[50], taken
