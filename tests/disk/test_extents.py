"""The extent algebra against a model that looks at every byte."""

from __future__ import annotations

import pickle
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupcore.disk.extents import Extent, ExtentTable, Kind, coalesce, complement, intersect, to_clusters, total

DATA, ZERO = Kind.DATA, Kind.ZERO


def as_bytes(extents, size):
    """One letter for each byte: D, Z, or a dot where it is not listed."""
    picture = ["."] * size
    for offset, length, kind in extents:
        for at in range(offset, offset + length):
            assert picture[at] == ".", "two extents cover one byte"
            picture[at] = "D" if kind is DATA else "Z"
    return "".join(picture)


@st.composite
def extent_lists(draw, size=60):
    cuts = sorted(draw(st.lists(st.integers(0, size), max_size=14)))
    kinds = [draw(st.sampled_from([DATA, ZERO, None])) for _ in cuts]
    return [Extent(a, b - a, kind) for a, b, kind in zip(cuts, cuts[1:], kinds, strict=False) if kind]


@given(extent_lists())
def test_coalesce_keeps_every_byte_and_leaves_no_neighbours_of_one_kind(extents):
    joined = list(coalesce(extents))
    assert as_bytes(joined, 60) == as_bytes(extents, 60)
    assert all(a.end < b.offset or a.kind is not b.kind for a, b in pairwise(joined))
    assert all(extent.length > 0 for extent in joined)


@pytest.mark.parametrize(
    "extents",
    [
        [Extent(10, 10, DATA), Extent(0, 5, DATA)],
        [Extent(0, 10, DATA), Extent(9, 5, ZERO)],
        [Extent(0, -1, DATA)],
    ],
    ids=["order", "overlap", "negative"],
)
def test_what_is_no_list_of_extents_is_refused(extents):
    for function in (coalesce, ExtentTable, lambda bad: to_clusters(bad, 100, 4)):
        with pytest.raises(ValueError, match=r"negative|overlaps"):
            list(function(extents))


@given(extent_lists(), st.integers(50, 60), st.sampled_from([1, 4, 7, 16, 64]))
def test_to_clusters(extents, size, cluster):
    extents = list(intersect(extents, [(0, size)]))
    before = as_bytes(extents, size)
    expected = ""
    for start in range(0, size, cluster):
        letters = set(before[start : start + cluster])
        letter = "." if letters == {"."} else "Z" if letters == {"Z"} else "D"
        expected += letter * cluster
    result = list(to_clusters(extents, size, cluster))
    assert as_bytes(result, len(expected)) == expected
    assert all(part.offset % cluster == 0 == part.length % cluster for part in result)
    assert result == list(coalesce(result))


def test_a_cluster_that_is_zero_in_part_and_else_unknown_is_read():
    assert list(to_clusters([Extent(0, 100, ZERO)], 65536 * 2)) == [Extent(0, 65536, DATA)]
    # The tail of the last cluster lies past the disk, so there is nothing unknown in it.
    assert list(to_clusters([Extent(65536, 100, ZERO)], 65636)) == [Extent(65536, 65536, ZERO)]


@pytest.mark.parametrize("extent", [Extent(0, 101, DATA), Extent(-1, 2, DATA), Extent(200, 1, ZERO)])
def test_extents_outside_the_disk_are_refused(extent):
    with pytest.raises(ValueError, match="outside a disk of 100 bytes"):
        list(to_clusters([extent], 100))


def test_a_huge_extent_costs_no_more_than_a_small_one():
    assert list(to_clusters([Extent(1, 1 << 60, DATA)], 1 << 61)) == [Extent(0, (1 << 60) + 65536, DATA)]


@given(extent_lists(), extent_lists())
def test_intersect_and_complement(extents, others):
    ranges = [(offset, length) for offset, length, _ in others]
    mask = as_bytes(others, 60)
    expected = "".join(a if b != "." else "." for a, b in zip(as_bytes(extents, 60), mask, strict=True))
    assert as_bytes(intersect(extents, ranges), 60) == expected
    rest = [Extent(offset, length, DATA) for offset, length in complement(others, 55)]
    assert as_bytes(rest, 55) == "".join("D" if letter == "." else "." for letter in mask[:55])


@given(extent_lists())
def test_total(extents):
    picture = as_bytes(extents, 60)
    assert (total(extents), total(extents, DATA), total(extents, ZERO)) == (
        60 - picture.count("."),
        picture.count("D"),
        picture.count("Z"),
    )


@given(extent_lists(), st.integers(0, 59), st.integers(0, 30))
def test_the_table_is_the_list(extents, offset, length):
    joined = list(coalesce(extents))
    table = ExtentTable(extents)
    assert list(table) == joined == [table[i] for i in range(len(table))]
    assert table == ExtentTable(joined) == pickle.loads(pickle.dumps(table))
    assert list(table[1:-1]) == joined[1:-1]
    assert table.at(offset) == next((part for part in joined if part.offset <= offset < part.end), None)
    assert list(table.within(offset, length)) == list(intersect(joined, [(offset, length)]))


def test_a_table_of_many_extents_is_small():
    table = ExtentTable(Extent(i * 131072, 65536, DATA) for i in range(200_000))
    assert len(pickle.dumps(table)) < 200_000 * 17 + 1000
    assert table.at(131072 * 150_000 + 65535) == Extent(131072 * 150_000, 65536, DATA)
    assert table.at(131072 * 150_000 + 65536) is None
