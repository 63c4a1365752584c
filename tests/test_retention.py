"""KEEP_LAST as arithmetic: what goes, for any images and any settings."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupcore.chain import Chain, full_is_due, plan, retention
from backupcore.model import VM, Disk, Image, Increment, SourceRef, Type

WEB = VM(uuid="7d1c1a4e-0000-4000-8000-000000000001", name="web1")


@st.composite
def images(draw: st.DrawFn) -> list[Chain]:
    """Those of one VM in one datastore, as a catalog may hold them: at most one is open, and it is the newest."""
    found = []
    for number in range(1, draw(st.integers(0, 9)) + 1):
        first = draw(st.integers(0, 5))
        found.append(
            Chain(
                number=number,
                state=draw(st.sampled_from(["closed", "closed", "closed", "damaged", "flattening"])),
                pinned=draw(st.integers(0, 4)) == 0,
                ours=draw(st.integers(0, 4)) > 0,
                ids=tuple(range(first, first + draw(st.integers(0, 9)))),
            )
        )
    if found and draw(st.integers(0, 4)):
        found[-1] = replace(found[-1], state="open")
    return draw(st.permutations(found))


choices = st.fixed_dictionaries(
    {
        "MODE": st.sampled_from(["FULL", "INCREMENT"]),
        "KEEP_LAST": st.integers(0, 9).map(str),
        "KEEP_CHAINS": st.one_of(st.just(""), st.integers(0, 9).map(str)),
    }
)


@given(found=images(), settings=choices)
def test_what_goes_is_never_what_must_stay(found: list[Chain], settings: dict[str, str]):
    due = retention(found, settings)
    by_number = {chain.number: chain for chain in found}
    going = [by_number[one.number] for one in due.removals]
    assert all(one.state == "closed" and one.ours and not one.pinned for one in going)
    newest = max((chain for chain in found if chain.ids), key=lambda chain: chain.number, default=None)
    assert newest not in going, "the newest restorable increment stays"
    if due.removals or due.flattening:
        assert newest is not None
        assert newest.state == "open"
    assert [one.number for one in due.removals] == sorted(one.number for one in due.removals), "oldest first"
    kept = [one for one in found if one.ids and one not in going and one is not newest]
    touchable = [one for one in kept if one.state == "closed" and one.ours and not one.pinned]
    assert all(one.number < other.number for one in going for other in touchable), "the oldest go, not others"
    if due.flattening:
        chain = by_number[due.flattening.number]
        assert (chain is newest, chain.ours, chain.pinned, settings["MODE"]) == (True, True, False, "INCREMENT")
        assert due.flattening.to in chain.ids[1:], "there is something to merge"


@given(found=images(), settings=choices)
def test_what_stays_is_as_many_as_asked_for(found: list[Chain], settings: dict[str, str]):
    due = retention(found, settings)
    keep = int(settings["KEEP_LAST"])
    newest = max((chain for chain in found if chain.ids), key=lambda chain: chain.number, default=None)
    if newest is None or newest.state != "open":
        assert not due.removals
        assert not due.flattening
        return
    gone = {one.number for one in due.removals}
    others = [one for one in found if one.ids and one is not newest and one.state == "closed"]
    others = [one for one in others if one.ours and not one.pinned]
    left = [one for one in others if one.number not in gone]
    if settings["MODE"] == "FULL":
        assert len(left) == (min(len(others), keep - 1) if keep else len(others))
        assert due.flattening is None
        return
    closed = keep if settings["KEEP_CHAINS"] == "" else int(settings["KEEP_CHAINS"])
    assert len(left) == (min(len(others), closed) if closed else len(others))
    too_many = keep and len(newest.ids) > keep and newest.ours and not newest.pinned
    assert bool(due.flattening) is bool(too_many)
    if due.flattening:
        assert len([one for one in newest.ids if one >= due.flattening.to]) == keep


@given(found=images(), settings=choices)
def test_what_was_done_leaves_nothing_to_do(found: list[Chain], settings: dict[str, str]):
    due = retention(found, settings)
    gone = {one.number for one in due.removals}
    left = [one for one in found if one.number not in gone]
    if due.flattening:
        to = due.flattening.to
        left = [
            replace(one, ids=tuple(number for number in one.ids if number >= to))
            if one.number == due.flattening.number
            else one
            for one in left
        ]
    again = retention(left, settings)
    assert (again.removals, again.flattening) == ((), None)


@given(keep=st.integers(1, 5), every=st.integers(0, 9), nights=st.integers(1, 40))
def test_nights(keep: int, every: int, nights: int):
    """What a VM has after so many nights, by the plan of each run and the retention after it."""
    settings = {"MODE": "INCREMENT", "KEEP_LAST": str(keep), "FULL_EVERY": str(every)}
    chains: list[Chain] = []
    for _ in range(nights):
        if chains and not (every and chains[-1].ids[-1] + 1 >= every):
            chains[-1] = replace(chains[-1], ids=(*chains[-1].ids, chains[-1].ids[-1] + 1))
        else:
            number = chains[-1].number + 1 if chains else 1
            chains = [replace(one, state="closed") for one in chains]
            chains.append(Chain(number=number, state="open", pinned=False, ours=True, ids=(0,)))
        due = retention(chains, settings)
        gone = {one.number for one in due.removals}
        chains = [one for one in chains if one.number not in gone]
        if due.flattening:
            ids = tuple(one for one in chains[-1].ids if one >= due.flattening.to)
            chains[-1] = replace(chains[-1], ids=ids)
        assert all(len(one.ids) <= keep for one in chains)
        assert len(chains) <= keep + 1
    assert sum(len(one.ids) for one in chains) >= min(keep, every or keep, nights)


def test_the_reasons_name_the_setting():
    chains = [
        Chain(number=number, state="closed" if number < 4 else "open", pinned=False, ours=True, ids=(0, 1, 2))
        for number in range(1, 5)
    ]
    full = retention(chains, {"MODE": "FULL", "KEEP_LAST": "2"})
    assert [(one.number, one.why) for one in full.removals] == [
        (1, "KEEP_LAST=2: 2 newer images stay"),
        (2, "KEEP_LAST=2: 2 newer images stay"),
    ]
    some = retention(chains, {"MODE": "INCREMENT", "KEEP_LAST": "2", "KEEP_CHAINS": ""})
    assert [(one.number, one.why) for one in some.removals] == [(1, "KEEP_LAST=2: 2 newer closed images stay")]
    assert (some.flattening.number, some.flattening.to, some.flattening.why) == (
        4,
        1,
        "KEEP_LAST=2: it has 3 increments",
    )
    other = retention(chains, {"MODE": "INCREMENT", "KEEP_LAST": "0", "KEEP_CHAINS": "1"})
    assert [one.why for one in other.removals] == ["KEEP_CHAINS=1: 1 newer closed images stay"] * 2
    half = retention([*chains[:3], replace(chains[3], state="closed")], {"MODE": "FULL", "KEEP_LAST": "1"})
    assert (half.removals, half.passed[0].number) == ((), 4)


def closed(number: int, **more: object) -> Chain:
    return replace(Chain(number=number, state="closed", pinned=False, ours=True, ids=(0,)), **more)


def test_the_oldest_is_what_was_recorded_first_whatever_its_number_is():
    """A rebuild gives old images new numbers."""
    chains = [closed(9, order=1), closed(1, order=2), closed(2, order=3), closed(3, order=4, state="open")]
    due = retention(chains, {"MODE": "FULL", "KEEP_LAST": "2"})
    assert [one.number for one in due.removals] == [9, 1]


@pytest.mark.parametrize("settings", [{"MODE": "FULL", "KEEP_LAST": "3"}, {"MODE": "INCREMENT", "KEEP_CHAINS": "2"}])
def test_what_is_dated_ahead_stays_and_displaces_nothing(settings: dict[str, str]):
    nights = [closed(number) for number in range(1, 5)]
    wrong = [closed(number, ahead="2099-01-01") for number in (5, 6)]
    due = retention([*nights, *wrong, closed(7, state="open")], settings)
    assert [one.number for one in due.removals] == [1, 2]
    assert [(one.number, one.expected) for one in due.passed] == [(5, False), (6, False)]
    assert all("2099-01-01, ahead of the clock" in one.why for one in due.passed)
    # Nor does the newest, while the clock is still wrong for whoever looks.
    due = retention([*nights, closed(7, state="open", ahead="2099-01-01")], settings)
    assert [one.number for one in due.removals] == ([1] if settings["MODE"] == "FULL" else [1, 2])
    pinned = retention([*nights, replace(wrong[0], pinned=True), closed(7, state="open")], settings)
    assert pinned.passed == (), "nobody has to be told of what he pinned, before its turn comes"


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ({"pinned": True}, True),
        ({"state": "flattening"}, True),
        ({"state": "damaged"}, False),
        ({"ours": False, "owner": "f" * 32}, False),
        ({"ours": False}, False),
    ],
)
def test_what_stays_though_its_turn_has_come_is_told(held: dict[str, object], expected: bool):
    old = closed(1, **held)
    later = [closed(2), closed(3), closed(4, state="open")]
    (told,) = retention([old, *later], {"MODE": "FULL", "KEEP_LAST": "2"}).passed
    assert (told.number, told.expected) == (1, expected)
    assert str(held.get("owner", "")) in told.why
    assert not retention([old, later[-1]], {"MODE": "FULL", "KEEP_LAST": "7"}).passed, "its turn has not come"


def image(last: int, began: datetime, **more: object) -> Image:
    increment = Increment(
        id=last,
        pid=-1,
        type=Type.FULL,
        point="0" * 32,
        source=SourceRef("s"),
        size=1,
        date=began + timedelta(days=last),
        consistency="crash",
        reason="",
        digest="0" * 64,
        disks=(Disk(id="vda", artifact="disk.vda.qcow2", virtual_size=1, whole=True),),
    )
    return Image(
        uuid="a" * 32, number=7, vm=WEB, datastore="nas", state="open", increments=(increment,), began=began, **more
    )


NIGHT = datetime(2026, 1, 1, 2, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("last", "every", "now", "due"),
    [
        (6, "0", NIGHT + timedelta(days=400), False),
        (5, "7", NIGHT, False),
        (6, "7", NIGHT, True),
        (0, "1", NIGHT, True),
        (0, "1d", NIGHT + timedelta(hours=20), False),
        (0, "7d", NIGHT + timedelta(days=6, hours=20), False),
        (0, "7d", NIGHT + timedelta(days=7, minutes=-25), True),
        (0, "0d", NIGHT + timedelta(days=70), False),
        (0, "30d", NIGHT - timedelta(hours=23), False),
        (0, "30d", NIGHT - timedelta(days=26_000), True),
        (0, "7", NIGHT - timedelta(days=26_000), False),
    ],
)
def test_full_every(last: int, every: str, now: datetime, due: bool):
    found = image(last, NIGHT)
    assert bool(full_is_due(found, every, now)) is due
    run = plan(found, vm=WEB, host="h", datastore="nas", settings={"FULL_EVERY": every}, now=now)
    assert run.type is (Type.FULL if due else Type.INCREMENT)
    if due:
        assert f"FULL_EVERY={every}: image 7" in run.reason
