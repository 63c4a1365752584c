from __future__ import annotations

from datetime import UTC, datetime

import pytest

from backupcore.chain import lineage, plan
from backupcore.errors import IntegrityError, NotFound
from backupcore.model import VM, Disk, Image, Increment, SourceRef, Type

WEB = VM(uuid="7d1c1a4e-0000-4000-8000-000000000001", name="web1")


def increment(number: int, pid: int, kind: Type = Type.INCREMENT) -> Increment:
    return Increment(
        id=number,
        pid=pid,
        type=kind,
        point=f"{number:032x}",
        source=SourceRef(f"s{number}"),
        size=1,
        date=datetime(2026, 1, 1, tzinfo=UTC),
        consistency="crash",
        reason="",
        digest=f"{number:064x}",
        disks=(Disk(id="vda", artifact="disk.vda.qcow2", virtual_size=1, whole=kind is Type.FULL),),
    )


def image(*increments: Increment, state: str = "open") -> Image:
    return Image(uuid="a" * 32, number=7, vm=WEB, datastore="nas", state=state, increments=increments)


def next_run(found: Image | None, reset: bool = False, **settings: str):
    return plan(found, vm=WEB, host="h", datastore="nas", settings=settings, reset=reset)


CHAIN = image(increment(0, -1, Type.FULL), increment(1, 0), increment(2, 1))


def test_the_first_backup_is_a_full():
    run = next_run(None)
    assert (run.type, run.number, run.parent, run.builds_on, run.tracked) == (Type.FULL, 0, None, (), True)
    assert "first" in run.reason


def test_an_open_image_goes_on():
    run = next_run(CHAIN)
    assert (run.type, run.number, run.image, run.reason) == (Type.INCREMENT, 3, CHAIN.uuid, "")
    assert run.parent.point == CHAIN.increments[2].point
    assert run.parent.digest == CHAIN.increments[2].digest
    assert [source.token for source in run.builds_on] == ["s0", "s1", "s2"]
    assert run.spent == (CHAIN.increments[0].point, CHAIN.increments[1].point), "the last two checkpoints stay"


@pytest.mark.parametrize(
    ("found", "reset", "settings", "word"),
    [
        (CHAIN, True, {}, "reset"),
        (CHAIN, False, {"MODE": "FULL"}, "MODE=FULL"),
        (image(increment(0, -1, Type.FULL), state="closed"), False, {}, "closed"),
        (image(), False, {}, "first"),
    ],
)
def test_why_a_full(found: Image, reset: bool, settings: dict[str, str], word: str):
    run = next_run(found, reset, **settings)
    assert run.type is Type.FULL
    assert word in run.reason
    assert run.image != found.uuid
    assert run.spent == tuple(one.point for one in found.increments), (
        "the old chain's checkpoints go once this is recorded"
    )
    assert run.tracked is (settings.get("MODE") != "FULL")


def test_an_impossible_increment_becomes_a_full_that_lets_the_whole_old_chain_go():
    run = next_run(CHAIN)
    full = run.as_full("bitmap is gone")
    assert (full.type, full.number, full.parent, full.builds_on, full.reason) == (
        Type.FULL,
        0,
        None,
        (),
        "bitmap is gone",
    )
    assert full.image != run.image
    assert full.point == run.point, "what cleans up after a killed run knows this name"
    assert set(full.spent) == {one.point for one in CHAIN.increments}


def test_lineage_is_oldest_first_and_ends_at_the_one_asked_for():
    assert [one.id for one in lineage(CHAIN)] == [0, 1, 2]
    assert [one.id for one in lineage(CHAIN, 1)] == [0, 1]


def test_lineage_of_a_flattened_image_starts_at_its_full():
    flattened = image(increment(3, -1, Type.FULL), increment(4, 3))
    assert [one.id for one in lineage(flattened)] == [3, 4]


def test_lineage_refuses_gaps_loops_and_unknown_numbers():
    with pytest.raises(NotFound):
        lineage(CHAIN, 9)
    with pytest.raises(NotFound):
        lineage(image())
    with pytest.raises(IntegrityError):
        lineage(image(increment(0, -1, Type.FULL), increment(2, 1)))
    with pytest.raises(IntegrityError):
        lineage(image(increment(1, 2), increment(2, 1)))
