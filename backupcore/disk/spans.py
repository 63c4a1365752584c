"""What a restore fetches at once: stretches of the layers' files, large enough that a request does not count.

A long chain is in as many runs as the guest wrote in places. In a layer's own file what wins of it lies together again,
so runs of one layer are joined, also over a few clusters that are not needed: reading those costs less than a request.
Spans end where a multiple of `MOST` clusters of the file does: a store keeps a large file in parts, of 8 MiB for most,
and reads both for a request that goes over the end of one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from backupcore.disk.winners import Run

__all__ = ["MOST", "Span", "spans"]

MOST = 128
"""Clusters of one span at most: 8 MiB."""

_GAP = 8  # clusters between two runs that are fetched and thrown away
_OPEN = 64  # spans that may still grow while others are met: a few for each layer


@dataclass(slots=True)
class Span:
    """The data clusters ``[at, at + clusters)`` in the file of `layer`, and the runs of the result that lie there."""

    layer: int
    at: int
    clusters: int
    runs: list[Run]


def spans(runs: Iterable[Run], starts: Sequence[int]) -> Iterator[Span]:
    """The spans that hold `runs`, roughly in their order. Each run is in exactly one, cut where a span ends.

    `starts` tells for each layer which cluster of its file is the first with data.
    """
    begun: OrderedDict[tuple[int, int], Span] = OrderedDict()  # by layer and end
    for run in runs:
        start = starts[run.layer]
        done = 0
        while done < run.clusters:
            first, at = run.first + done, run.at + done
            end = ((start + at) // MOST + 1) * MOST - start
            span = next((begun.pop(key) for gap in range(_GAP + 1) if (key := (run.layer, at - gap)) in begun), None)
            if span is None or span.at < end - MOST:
                if span is not None:
                    yield span
                span = Span(run.layer, at, 0, [])
            count = min(run.clusters - done, end - at)
            span.runs.append(Run(first, run.layer, at, count))
            span.clusters = at + count - span.at
            done += count
            if at + count == end:
                yield span
                continue
            if len(begun) == _OPEN:
                yield begun.popitem(last=False)[1]
            begun[run.layer, at + count] = span
    yield from begun.values()
