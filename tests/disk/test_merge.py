"""The merge against a model of the guest's disk, and against QEMU's own reading of the same chain."""

from __future__ import annotations

import io
import itertools
import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings

from backupcore.disk import nbd
from backupcore.disk.extents import CLUSTER, Extent, Kind, to_clusters
from backupcore.disk.merge import Layer, merge
from backupcore.disk.qcow2 import DiskArtifact, Layout
from backupcore.disk.writer import DiskWriter
from backupcore.errors import Cancelled, IntegrityError
from tests.disk.layers import Made, Model, Recording, chains, clusters, make
from tests.disk.qemu_nbd import QemuNbd, run

slow = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
quick = settings(slow, max_examples=40)
soak = settings(slow, max_examples=1500)


def newest_first(made: list[Made]) -> list[Layer]:
    named = [one.layer(f"increment {number}, disk vda") for number, one in enumerate(made)]
    return named[::-1]


def truth(made: list[Made]) -> Model:
    model = Model()
    for one in made:
        model.apply(one)
    return model


# Against the model


@quick
@given(made=chains())
def test_the_newest_wins(made: list[Made]):
    model = truth(made)
    target = Recording(model.size)
    merge(newest_first(made), target)
    target.check_complete()
    assert {offset: data for offset, data in target.data.items() if any(data)} == model.nonzero()


@pytest.mark.soak
@soak
@given(made=chains())
def test_the_newest_wins_in_many_chains(made: list[Made]):
    test_the_newest_wins.hypothesis.inner_test(made)


# Against QEMU


def against_qemu(made: list[Made], folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    merged, raw = folder / "merged.qcow2", folder / "truth.raw"
    model = truth(made)
    model.write_raw(raw)
    with DiskWriter(merged, model.size) as writer:
        merge(newest_first(made), writer)
        writer.finish()
    run("qemu-img", "check", merged)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", merged, raw)
    below: Path | None = None
    for number, one in enumerate(made):
        path = folder / f"{number}.qcow2"
        path.write_bytes(one.file)
        if below and not one.whole:
            run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", below, path)
        below = path
    assert below
    run("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", below, merged)


@slow
@given(made=chains(sectors=True))
def test_qemu_reads_the_same_from_the_layers_as_a_chain(made: list[Made], tmp_path: Path):
    against_qemu(made, tmp_path)


@pytest.mark.soak
@soak
@given(made=chains(sectors=True))
def test_qemu_reads_the_same_from_many_chains(made: list[Made], tmp_path: Path):
    against_qemu(made, tmp_path)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_disk_that_qemu_wrote_zeroed_discarded_and_grew(seed: int, tmp_path: Path):
    """A guest's life: writes, zeroes and discards between points; layers taken through NBD, with a dirty bitmap."""
    source = random.Random(seed)
    disk = tmp_path / "disk.qcow2"
    size = 5 * 1024 * 1024 + 3584
    run("qemu-img", "create", "-f", "qcow2", "-o", "cluster_size=4k", disk, str(size))
    made: list[Made] = []
    points: list[Path] = []
    for number in range(5):
        commands: list[str] = []
        for _ in range(12):
            start = source.randrange(0, size, 512)
            length = min(source.choice([512, 4096, 65536, 200 * 1024, 1 << 20]), size - start)
            verb = source.choice([f"write -P {source.randrange(1, 256)}", "write -z", "write -zu", "discard"])
            commands += ["-c", f"{verb} {start} {length}"]
        run("qemu-io", "-d", "unmap", "-f", "qcow2", *commands, disk)
        made.append(taken(disk, f"b{number - 1}" if number else None))
        points.append(tmp_path / f"{number}.raw")
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk, points[-1])
        if number == 2:
            size += 3 * 1024 * 1024 + 512  # before the next bitmap, which a resize would have to follow
            run("qemu-img", "bitmap", "--remove", "-f", "qcow2", disk, "b1")
            run("qemu-img", "resize", "-f", "qcow2", disk, str(size))
        if number:
            with suppress(AssertionError):
                run("qemu-img", "bitmap", "--remove", "-f", "qcow2", disk, f"b{number - 1}")
        run("qemu-img", "bitmap", "--add", "-g", "64k", "-f", "qcow2", disk, f"b{number}")
    for number, point in enumerate(points):
        merged = tmp_path / f"merged{number}.qcow2"
        with DiskWriter(merged, made[number].layout.virtual_size) as writer:
            merge(newest_first(made[: number + 1]), writer)
            writer.finish()
        run("qemu-img", "check", merged)
        run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", merged, point)
    assert any(extent.kind is Kind.ZERO for one in made[1:] for extent in one.extents)


def taken(disk: Path, bitmap: str | None) -> Made:
    """A backup of a disk that is off: full, or what a bitmap says."""
    with QemuNbd(disk, "qcow2", bitmaps=[bitmap] if bitmap else []) as server:
        context = f"qemu:dirty-bitmap:{bitmap}"
        with nbd.Client(server.address, [nbd.ALLOCATION, *([context] if bitmap else [])]) as client:
            size = client.size
            told = nbd.changes(client, context, 0, size) if bitmap else nbd.allocation(client, 0, size)
            found = list(to_clusters(told, size))
        artifact = DiskArtifact("disk.vda.qcow2", Layout(size, found), server.address)
        with artifact.open() as stream:
            file = stream.read()
        artifact.close()
    layout = artifact.layout
    sums = [blake3(file[at : at + CLUSTER]).digest() for at in range(layout.data_offset, layout.size, CLUSTER)]
    return Made(found, {}, layout, file, b"".join(sums), not bitmap)


# How the layers are read


class Watched(io.BytesIO):
    """A stream that a test can ask how far it was read, and which forbids seeking."""

    live = 0

    def __init__(self, data: bytes, most: int = 1 << 30) -> None:
        super().__init__(data)
        self.most = most
        self.longest = 0
        Watched.live += 1

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None
        assert size > 0
        self.longest = max(self.longest, size)
        return super().read(min(size, self.most))

    def seek(self, *_: object) -> int:
        raise AssertionError("a stream from a store cannot seek")

    def close(self) -> None:
        if not self.closed:
            Watched.live -= 1
            self.left = self.getbuffer().nbytes - self.tell()
        super().close()


def data(first: int, count: int) -> Extent:
    return Extent(first * CLUSTER, count * CLUSTER, Kind.DATA)


SIZE = 64 * CLUSTER
FULL = make(SIZE, [data(0, 64)], seed=1)
UPPER = make(SIZE, [data(0, 8), Extent(20 * CLUSTER, 4 * CLUSTER, Kind.ZERO), data(40, 24)], whole=False, seed=2)


def never() -> io.BytesIO:
    raise AssertionError("this layer is not needed")


def test_layers_that_are_not_needed_are_not_opened():
    oldest = FULL.layer("oldest", open=never, sums=never)
    for layers in (
        [FULL.layer(), oldest],  # a whole one comes before it
        [make(SIZE, [data(0, 64)], whole=False).layer(), oldest],  # nothing is left for it
        [UPPER.layer(), make(SIZE, [data(8, 32)], whole=False).layer(), oldest],
    ):
        target = Recording(SIZE)
        merge(layers, target)
        target.check_complete()


def test_streams_are_read_in_order_one_layer_at_a_time_no_further_than_needed():
    opened: list[Watched] = []

    def watch(content: bytes) -> Callable[[], Watched]:
        def opener() -> Watched:
            assert Watched.live == len(opened) % 2  # the other stream of the same layer at most
            opened.append(Watched(content, most=5000 if len(opened) % 2 else 70000))
            return opened[-1]

        return opener

    layers = [one.layer(open=watch(one.file), sums=watch(one.sums)) for one in (UPPER, FULL)]
    merge(layers, Recording(SIZE))
    assert Watched.live == 0
    assert len(opened) == 4
    assert max(stream.longest for stream in opened) <= 1 << 20
    assert [stream.left for stream in opened] == [0, 0, 24 * CLUSTER, 24 * 32]


def test_a_cancel_is_looked_for_with_each_mib_and_progress_ends_at_the_total():
    checks, seen = [], []
    merge(newest_first([FULL, UPPER]), Recording(SIZE), progress=seen.append, check=lambda: checks.append(seen[-1:]))
    total = FULL.layout.size + UPPER.layout.size
    assert seen == sorted(seen)
    assert seen[-1] == total
    at_checks = [one[0] for one in checks if one]
    assert all(two - one <= 1 << 20 for one, two in itertools.pairwise(at_checks))


@pytest.mark.parametrize("calls", [1, 5, 12])
def test_a_cancel_ends_it(calls: int):
    left = iter(range(calls))

    def check() -> None:
        if next(left, None) is None:
            raise Cancelled("cancelled")

    with pytest.raises(Cancelled):
        merge(newest_first([FULL, UPPER]), Recording(SIZE), check=check)


# Damage


def test_a_chain_without_its_full_is_refused():
    with pytest.raises(IntegrityError, match=r"lacks its full \(its oldest is increment 0, disk vda\)"):
        merge([UPPER.layer()], Recording(SIZE))
    with pytest.raises(IntegrityError, match="lacks its full"):
        merge([], Recording(SIZE))


def flipped(content: bytes, at: int) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 16
    return bytes(changed)


@pytest.mark.parametrize("cluster", [0, 7, 8, 20, 31])
def test_damaged_data_are_named_and_not_written(cluster: int):
    file = flipped(UPPER.file, UPPER.layout.data_offset + cluster * CLUSTER + 4711)
    offset = (cluster if cluster < 8 else 32 + cluster) * CLUSTER
    target = Recording(SIZE)
    layers = [UPPER.layer("increment 7, disk vdb", open=lambda: io.BytesIO(file)), FULL.layer()]
    with pytest.raises(
        IntegrityError, match=rf"increment 7, disk vdb: .* guest's offset {offset} are not those backed"
    ):
        merge(layers, target)
    assert offset not in target.data


def test_damage_to_data_that_newer_layers_replaced_does_no_harm():
    file = flipped(FULL.file, FULL.layout.data_offset + 5 * CLUSTER)
    target = Recording(SIZE)
    merge([UPPER.layer(), FULL.layer(open=lambda: io.BytesIO(file))], target)
    target.check_complete()
    file = flipped(FULL.file, FULL.layout.data_offset + 8 * CLUSTER)
    with pytest.raises(IntegrityError, match=f"offset {8 * CLUSTER} "):
        merge([UPPER.layer(), FULL.layer("full", open=lambda: io.BytesIO(file))], Recording(SIZE))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"open": lambda: io.BytesIO(FULL.file[:-1])}, "the full ends too early: 1 of"),
        ({"open": lambda: io.BytesIO(FULL.file[:-CLUSTER])}, "the full ends too early"),
        ({"open": lambda: io.BytesIO(FULL.file[:100])}, "the full: the qcow2 file ends too early"),
        ({"open": lambda: io.BytesIO(b"")}, "the full: the qcow2 file ends too early"),
        ({"open": lambda: io.BytesIO(FULL.file + b"x")}, "the full goes on past its"),
        ({"sums": lambda: io.BytesIO(FULL.sums[:-1])}, "the full: the list of digests ends too early"),
        ({"sums": lambda: io.BytesIO(FULL.sums + b"x")}, "the full: the list of digests goes on past its 2048 bytes"),
        ({"sums": lambda: io.BytesIO(flipped(FULL.sums, 99))}, f"the full: .* offset {3 * CLUSTER} are not those"),
        ({"open": lambda: io.BytesIO(UPPER.file)}, "the full: the qcow2 .*"),
        ({"tables_digest": bytes(32)}, "the full: the qcow2 tables are not those that were written"),
        ({"size": FULL.layout.size + CLUSTER}, "the full: a qcow2 file of .* cannot be"),
        ({"virtual_size": SIZE + 512}, "the full: the qcow2 header has .* as virtual size"),
        (
            {"open": lambda: io.BytesIO(random.Random(1).randbytes(len(FULL.file)))},
            "the full: the qcow2 header is none",
        ),
    ],
)
def test_a_layer_that_is_not_what_the_manifest_says_is_refused(changes: dict[str, object], message: str):
    with pytest.raises(IntegrityError, match=message):
        merge([FULL.layer("the full", **changes)], Recording(SIZE))


def test_what_a_stream_raises_passes_through_and_everything_is_closed():
    class Failing(Watched):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 12 * CLUSTER:
                raise ConnectionResetError("gone")
            return super().read(size)

    before = Watched.live
    with pytest.raises(ConnectionResetError):
        merge([FULL.layer(open=lambda: Failing(FULL.file), sums=lambda: Watched(FULL.sums))], Recording(SIZE))
    assert Watched.live == before


def test_what_the_target_raises_passes_through():
    class Full(Recording):
        def write(self, offset: int, data: memoryview) -> None:
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        merge([FULL.layer()], Full(SIZE))


# Sizes


def test_what_a_shorter_disk_in_between_did_not_have_does_not_come_back():
    oldest = make(4 * CLUSTER, [data(0, 4)], seed=3)
    shorter = make(CLUSTER + 700, [], whole=False)
    newest = make(6 * CLUSTER, [Extent(5 * CLUSTER, CLUSTER, Kind.ZERO)], whole=False)
    target = Recording(6 * CLUSTER)
    merge(newest_first([oldest, shorter, newest]), target)
    target.check_complete()
    kept = {0: oldest.data[0], CLUSTER: oldest.data[CLUSTER][:700].ljust(CLUSTER, b"\0")}
    assert {offset: one for offset, one in target.data.items() if any(one)} == kept


def test_clusters_of_zeros_take_no_room(tmp_path: Path):
    made = make(SIZE, [data(0, 64)], seed=1)
    zeros = sum(not any(one) for one in made.data.values())
    assert zeros
    path = tmp_path / "disk.qcow2"
    with DiskWriter(path, SIZE) as writer:
        merge([made.layer()], writer)
        writer.finish()
    lines = json.loads(run("qemu-img", "map", "--output", "json", path))
    assert sum(line["length"] for line in lines if line["data"]) == SIZE - zeros * CLUSTER
    assert clusters(SIZE) == 64
