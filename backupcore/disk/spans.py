"""What a restore fetches at once: stretches of the layers' files, large enough that a request does not count.

A long chain is in as many runs as the guest wrote in places. In a layer's own file what wins of it lies together again,
so runs of one layer are joined, also over a few clusters that are not needed: reading those costs less than a request.
Spans end where a multiple of `MOST` clusters of the file does: a store keeps a large file in parts, of 8 MiB for most,
and reads both for a request that goes over the end of one. Layers come one after the other, each from its first cluster
to its last: restic unpacks up to 8 MiB for any byte of them, which the next span finds in its cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from backupcore.disk.winners import Run, Runs

__all__ = ["MOST", "Span", "spans"]

MOST = 256
"""Clusters of one span at most: 16 MiB."""

_GAP = 8  # clusters between two runs that are fetched and thrown away


@dataclass(slots=True)
class Span:
    """The data clusters ``[at, at + clusters)`` in the file of `layer`, and the runs of the result that lie there."""

    layer: int
    at: int
    clusters: int
    runs: list[Run]


def spans(runs: Runs, starts: Sequence[int]) -> Iterator[Span]:
    """The spans that hold `runs`, layer by layer. Each run is in exactly one, cut where a span ends.

    `starts` tells for each layer which cluster of its file is the first with data.
    """
    for layer, found in runs.by_layer():
        start = starts[layer]
        span: Span | None = None
        for run in found:
            done = 0
            while done < run.clusters:
                first, at = run.first + done, run.at + done
                end = ((start + at) // MOST + 1) * MOST - start
                if span is None or span.at < end - MOST or at > span.at + span.clusters + _GAP:
                    if span is not None:
                        yield span
                    span = Span(layer, at, 0, [])
                count = min(run.clusters - done, end - at)
                span.runs.append(Run(first, layer, at, count))
                span.clusters = at + count - span.at
                done += count
        if span is not None:
            yield span
