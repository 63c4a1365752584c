"""Layers laid over one another, compact or as a store copies them: against the model, QEMU, and hostile bytes."""

from __future__ import annotations

import io
import pickle
import random
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from backupcore.disk.extents import CLUSTER, Extent, Kind
from backupcore.disk.merge import Layer, merge
from backupcore.disk.merged import MergedArtifact, MergedBlocks, MergedLayer
from backupcore.disk.qcow2 import DiskArtifact, Layout
from backupcore.disk.scattered import ScatteredLayout
from backupcore.disk.stored import StoredDisk
from backupcore.disk.winners import Winners, winners, winners_as_they_lie
from backupcore.errors import IntegrityError
from backupcore.model import BytesArtifact
from tests.disk.layers import Made, Model, Recording, chains, make
from tests.disk.qemu_nbd import run

quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
slow = settings(quick, max_examples=12)
soak = settings(quick, max_examples=1500)

MAKERS = [winners, winners_as_they_lie]


def needed(made: list[Made]) -> list[Made]:
    """From the newest whole layer on."""
    first = max(number for number, one in enumerate(made) if one.whole)
    return made[first:]


def truth(made: list[Made]) -> Model:
    model = Model()
    for one in made:
        model.apply(one)
    return model


def flat(made: list[Made], folder: Path, how: object = winners) -> tuple[Winners, bytes, bytes]:
    """The winners of some layers, the file that comes of it, and its sums."""
    merged: Winners = how([one.layout for one in made])  # type: ignore[operator]  # one of MAKERS
    if merged.dead > merged.layout.clusters - merged.dead:
        assume(False)  # so many a flatten clears away
    layers = [
        MergedLayer(f"layer {number}", BytesArtifact("disk.vda.qcow2", one.file), one.layout.data_offset)
        for number, one in enumerate(made)
    ]
    sums = bytearray(merged.layout.clusters * 32)
    for run_ in merged.runs:
        found = made[run_.layer].sums[run_.at * 32 : (run_.at + run_.clusters) * 32]
        sums[run_.first * 32 : (run_.first + run_.clusters) * 32] = found
    path = folder / "sums"
    path.write_bytes(sums)
    blocks = pickle.loads(pickle.dumps(MergedBlocks(merged, layers, path)))
    if isinstance(merged.layout, Layout):
        artifact = DiskArtifact("disk.vda.qcow2", merged.layout, blocks)
    else:
        artifact = pickle.loads(pickle.dumps(MergedArtifact("disk.vda.qcow2", blocks)))
    with artifact.open() as file:
        data = file.read()
    artifact.close()
    own = b"".join(
        blake3(data[at : at + CLUSTER]).digest() for at in range(merged.layout.data_offset, len(data), CLUSTER)
    )
    if not merged.cut and isinstance(merged.layout, ScatteredLayout):
        assert own == sums, "the layers' digests are the result's"
    return merged, data, own


def as_layer(merged: Winners, data: bytes, sums: bytes) -> Layer:
    return Layer(
        name="the flattened full",
        open=lambda: io.BytesIO(data),
        sums=lambda: io.BytesIO(sums),
        size=merged.layout.size,
        virtual_size=merged.layout.virtual_size,
        whole=True,
        tables_digest=merged.layout.tables_digest(),
        order="file" if isinstance(merged.layout, ScatteredLayout) else "guest",
    )


def restored(layers: list[Layer], size: int) -> dict[int, bytes]:
    target = Recording(size)
    merge(layers, target)
    target.check_complete()
    return {offset: data for offset, data in target.data.items() if any(data)}


def the_newest_wins(made: list[Made], folder: Path, how: object) -> None:
    model = truth(made)
    merged, data, sums = flat(needed(made), folder, how)
    assert len(data) == merged.layout.size
    assert restored([as_layer(merged, data, sums)], model.size) == model.nonzero()


@pytest.mark.parametrize("how", MAKERS)
@quick
@given(made=chains())
def test_the_newest_wins(how: object, made: list[Made], tmp_path: Path):
    the_newest_wins(made, tmp_path, how)


@pytest.mark.soak
@pytest.mark.parametrize("how", MAKERS)
@soak
@given(made=chains())
def test_the_newest_wins_many_times(how: object, made: list[Made], tmp_path: Path):
    the_newest_wins(made, tmp_path, how)


@pytest.mark.parametrize("how", MAKERS)
@slow
@given(made=chains(sectors=True))
def test_qemu_reads_the_same_and_finds_nothing_to_repair(how: object, made: list[Made], tmp_path: Path):
    model = truth(made)
    _, data, _ = flat(needed(made), tmp_path, how)
    file, raw = tmp_path / "flat.qcow2", tmp_path / "truth.raw"
    file.write_bytes(data)
    model.write_raw(raw)
    assert "No errors were found" in run("qemu-img", "check", str(file))
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(file), str(raw))


@quick
@given(made=chains(), more=chains(longest=6))
def test_what_lies_as_it_was_copied_is_flattened_and_built_on_again(made: list[Made], more: list[Made], tmp_path: Path):
    """A scattered full below further increments: restored, laid out anew, and left as it lies once more."""
    merged, data, sums = flat(needed(made), tmp_path, winners_as_they_lie)
    above = [replace(one, whole=False) for one in more]
    model = truth([*made, *above])
    layers = [as_layer(merged, data, sums), *(one.layer() for one in above)]
    assert restored(layers[::-1], model.size) == model.nonzero()
    base = Made([], {}, merged.layout, data, sums, whole=True)  # type: ignore[arg-type]  # a layout of the other kind
    for how in MAKERS:
        again = flat([base, *above], tmp_path, how)
        assert restored([as_layer(*again)], model.size) == model.nonzero()
        if how is winners_as_they_lie:
            assert again[0].layout.clusters >= merged.layout.clusters, "nothing was moved"


def parse(data: bytes, layout: ScatteredLayout, *, digest: bool = True, size: int | None = None) -> object:
    return StoredDisk.parse(
        io.BytesIO(data),
        layout.size if size is None else size,
        virtual_size=layout.virtual_size,
        tables_digest=layout.tables_digest() if digest else None,
        order="file",
    )


@quick
@given(made=chains())
def test_the_tables_are_read_back_as_they_were(made: list[Made], tmp_path: Path):
    merged, data, _ = flat(needed(made), tmp_path, winners_as_they_lie)
    found = parse(data, merged.layout)
    assert isinstance(found, ScatteredLayout)
    assert found.tables(0, found.data_offset) == data[: found.data_offset]
    assert list(found.places(0, 1 << 60)) == list(merged.layout.places(0, 1 << 60))


@quick
@given(made=chains(longest=5), data=st.data())
def test_a_flipped_bit_in_the_tables_is_refused(made: list[Made], data: st.DataObject, tmp_path: Path):
    merged, file, _ = flat(needed(made), tmp_path, winners_as_they_lie)
    place = merged.layout.data_offset
    starts = st.builds(
        lambda cluster, at: cluster * CLUSTER + at, st.integers(0, place // CLUSTER - 1), st.integers(0, 130)
    )
    damaged = bytearray(file)
    damaged[data.draw(starts)] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(IntegrityError):
        parse(bytes(damaged), merged.layout)
    try:
        layout = parse(bytes(damaged), merged.layout, digest=False)
    except IntegrityError:
        return
    assert isinstance(layout, ScatteredLayout)
    assert layout.tables(0, layout.data_offset) == damaged[:place], "another file that the writer could have made"


@quick
@given(made=chains(longest=5), data=st.data())
def test_rubbish_is_refused_or_is_a_layout(made: list[Made], data: st.DataObject, tmp_path: Path):
    merged, file, _ = flat(needed(made), tmp_path, winners_as_they_lie)
    layout = merged.layout
    damaged = bytearray(file)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, layout.data_offset // 8 - 1)) * 8
        word = data.draw(
            st.sampled_from(
                [0, 1, CLUSTER, 1 << 63 | CLUSTER, 1 << 63 | layout.data_offset, layout.size, (1 << 64) - 1]
            )
        )
        damaged[at : at + 8] = word.to_bytes(8, "big")
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    size = data.draw(st.sampled_from([None, len(damaged), layout.size + CLUSTER, 1 << 60, 0, -CLUSTER]))
    try:
        found = parse(bytes(damaged), layout, digest=False, size=size)
    except IntegrityError:
        return
    assert isinstance(found, ScatteredLayout)
    assert found.tables(0, found.data_offset) == damaged[: found.data_offset]


def example() -> tuple[list[Made], int]:
    size = 40 * CLUSTER
    made = [
        make(size, [Extent(0, size, Kind.DATA)], seed=1),
        make(size, [Extent(3 * CLUSTER, 4 * CLUSTER, Kind.DATA), Extent(9 * CLUSTER, CLUSTER, Kind.ZERO)], whole=False),
    ]
    return made, size


def test_a_cluster_that_two_entries_share_is_refused(tmp_path: Path):
    """Two places of the guest's disk that are one: a write to the first would change the second."""
    made, _ = example()
    merged, file, _ = flat(made, tmp_path, winners_as_they_lie)
    damaged = bytearray(file)
    at = merged.layout.data_offset - CLUSTER  # the only L2 table
    damaged[at : at + 8] = damaged[at + 8 : at + 16]
    with pytest.raises(IntegrityError, match="used twice"):
        parse(bytes(damaged), merged.layout, digest=False)


def test_refcounts_that_are_not_those_of_the_entries_are_refused(tmp_path: Path):
    made, _ = example()
    merged, file, _ = flat(made, tmp_path, winners_as_they_lie)
    assert merged.dead == 5
    path = tmp_path / "flat.qcow2"
    path.write_bytes(file)
    assert "No errors were found" in run("qemu-img", "check", str(path)), "no leak either"
    damaged = bytearray(file)
    first = merged.layout.data_offset // CLUSTER + 3
    assert damaged[2 * CLUSTER + first * 2 : 2 * CLUSTER + first * 2 + 2] == b"\0\0", "a dead cluster"
    damaged[2 * CLUSTER + first * 2 + 1] = 1
    with pytest.raises(IntegrityError, match="refcount"):
        parse(bytes(damaged), merged.layout, digest=False)


def test_an_order_that_is_not_the_disks_is_refused(tmp_path: Path):
    made, _ = example()
    merged, file, _ = flat(made, tmp_path, winners_as_they_lie)
    with pytest.raises(IntegrityError):
        StoredDisk.parse(
            io.BytesIO(file), merged.layout.size, virtual_size=merged.layout.virtual_size, tables_digest=None
        )


def test_a_layer_is_read_forward_and_once(tmp_path: Path):
    """The pieces of a scattered full are taken in the order of its file: a store may have nothing but a stream."""
    made, size = example()
    merged, file, sums = flat(made, tmp_path, winners_as_they_lie)

    class Forward(io.BytesIO):
        def seek(self, *_: object) -> int:
            raise AssertionError("a stream has no other way than forward")

    layer = replace(as_layer(merged, file, sums), open=lambda: Forward(file))
    assert restored([layer], size) == truth(made).nonzero()


def test_many_small_pieces_in_a_long_chain_are_laid_out_in_one_pass():
    size = 2000 * CLUSTER
    chance = random.Random(1)
    layouts = [Layout(size, [Extent(0, size, Kind.DATA)])]
    newest = [0] * 2000
    for number in range(1, 200):
        written = sorted(chance.sample(range(2000), 40))
        layouts.append(Layout(size, [Extent(at * CLUSTER, CLUSTER, Kind.DATA) for at in written]))
        for at in written:
            newest[at] = number
    for how in MAKERS:
        merged = how(layouts)
        placed = {}
        for run_ in merged.runs:
            for number in range(run_.clusters):
                placed[run_.first + number] = run_.layer
        for offset, index, count in merged.layout.places(0, size):
            for number in range(count):
                assert placed[index + number] == newest[offset // CLUSTER + number]
