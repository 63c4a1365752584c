"""Spans: all of a result is fetched, each cluster of it once, in requests that are few and bounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backupcore.disk.spans import MOST, spans
from backupcore.disk.winners import Run, Runs


def laid(pieces: list[tuple[int, int, int]], *, backwards: bool = False) -> Runs:
    """Runs of a result, in its order, from (layer, clusters left out before it in the layer's file, clusters)."""
    ends: dict[int, int] = {}
    runs = []
    for layer, gap, clusters in pieces:
        at = ends.get(layer, 0) + gap
        ends[layer] = at + clusters
        runs.append((layer, at, clusters))
    return Runs(reversed(runs) if backwards else runs)


def clusters(runs: list[Run]) -> list[tuple[int, int, int]]:
    """(number in the result, layer, number in its file) of each cluster."""
    return [(run.first + n, run.layer, run.at + n) for run in runs for n in range(run.clusters)]


pieces = st.tuples(st.integers(0, 3), st.integers(0, 20), st.integers(1, 300))


@given(st.lists(pieces, max_size=40), st.booleans(), st.lists(st.integers(5, 3 * MOST), min_size=4, max_size=4))
def test_each_cluster_is_in_one_span_that_covers_it(
    found: list[tuple[int, int, int]], backwards: bool, starts: list[int]
) -> None:
    runs = laid(found, backwards=backwards)  # as a store's own copies may lie
    made = list(spans(runs, starts))
    assert sorted(clusters([run for span in made for run in span.runs])) == sorted(clusters(list(runs)))
    assert [(span.layer, span.at) for span in made] == sorted((span.layer, span.at) for span in made)
    for span in made:
        first = starts[span.layer] + span.at
        assert 0 < span.clusters <= MOST
        assert first // MOST == (first + span.clusters - 1) // MOST, "within one part of the file"
        assert all(run.layer == span.layer for run in span.runs)
        assert span.at == span.runs[0].at
        assert span.at + span.clusters == span.runs[-1].at + span.runs[-1].clusters
        ends = [run.at + run.clusters for run in span.runs]
        assert all(0 <= run.at - end <= 8 for end, run in zip(ends, span.runs[1:], strict=False))


def test_what_lies_together_is_fetched_together() -> None:
    whole = list(spans(laid([(0, 0, 3 * MOST)]), [13]))
    assert [(span.at, span.clusters) for span in whole] == [
        (0, MOST - 13),
        (MOST - 13, MOST),
        (2 * MOST - 13, MOST),
        (3 * MOST - 13, 13),
    ]
    # Every eighth cluster of a full is of one of two increments: the full's own are read over those.
    mixed = laid([(layer, int(layer == 0), 7 if layer == 0 else 1) for n in range(64) for layer in (0, 1 + n % 2)])
    made = list(spans(mixed, [0, 0, 0]))
    assert [span.layer for span in made] == [0, 0, 1, 2]


def test_what_lies_far_apart_is_not() -> None:
    far = laid([(0, 0, 1), (0, 9, 1), (0, 7, 1)])
    assert [(span.at, span.clusters) for span in spans(far, [0])] == [(0, 1), (10, 9)]
