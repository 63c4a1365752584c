"""A VM's disks as they are, held against what the newest increment of their chain would restore.

What tracks changes (a bitmap, an overlay) is believed by every increment. If it lies, what a guest wrote is in no
backup, and every digest of the chain holds all the same: it can only be noticed by reading what is said not to have
changed. The chain's side of the comparison are the digests that were taken when the disks were read: equal digests are
equal bytes, and so nothing of the backups' data is fetched.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from backupcore.chain import lineage
from backupcore.disk.extents import CLUSTER, Kind
from backupcore.disk.geometry import clusters_of
from backupcore.disk.table import DIGEST, digests
from backupcore.disk.winners import winners
from backupcore.errors import NotFound
from backupcore.merging import MergedDisk
from backupcore.opened import Opened, open_chain

if TYPE_CHECKING:
    from backupcore.context import Context
    from backupcore.datastore import Datastore
    from backupcore.disk.qcow2 import Pending
    from backupcore.hypervisor import Unchanged
    from backupcore.manifest import DiskPart
    from backupcore.model import Image

__all__ = ["ComparedDisk", "Due", "compare", "due"]

LEAST = 256
"""Clusters that are compared at least (16 MiB), whatever the share: a small disk is compared as a whole."""

_MOST_RANGES = 100  # differing ranges after which a disk is given up: it is known then that its chain is no good
_STEP = 16  # clusters read at once
_AHEAD = 4  # ... and how many such reads are under way


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedDisk:
    """What a comparison found of one disk, in bytes.

    `unchanged` is what was said not to have changed and the chain holds, `compared` how much of it was read and
    compared; of the rest of it, what reads as zeros on both sides needs no reading. `differing` are the ranges
    (offset, length) that are not what a restore would give, joined; the comparison of a disk ends after the first
    100. `why_not` says why it could not be compared.
    """

    id: str
    virtual_size: int = 0
    unchanged: int = 0
    compared: int = 0
    differing: tuple[tuple[int, int], ...] = ()
    why_not: str = ""


class _Run(NamedTuple):
    """Clusters in a row that are compared: the first, and how many.

    `at` is the number of the first among the chain's data clusters; -1: the chain has zeros there.
    """

    first: int
    clusters: int
    at: int


class Due:
    """What the last of `backups`, oldest first, would restore of the disk `part`, known by the digests of its clusters.

    Only tables and sums are fetched. The context's folder keeps the digests, 0.05 % of the data.
    """

    def __init__(self, backups: Sequence[Opened], part: DiskPart, ctx: Context) -> None:
        disk = MergedDisk(backups, part, ctx)
        self.virtual_size = part.virtual_size
        self._merged = winners(disk.layouts)
        self._sums = disk.blocks(self._merged, ctx.folder, ctx).sums

    def runs(self, held: Unchanged) -> Iterator[_Run]:
        """What of `held` is to be compared: where either side has data. In guest order."""
        for offset, end, kind in self._extents(held):
            position = offset
            for start, index, count in self._merged.layout.places(offset, end - offset):
                if kind is Kind.DATA and position < start:
                    yield _Run(position // CLUSTER, (start - position) // CLUSTER, -1)
                yield from self._whole(start // CLUSTER, count, index)
                position = start + count * CLUSTER
            if kind is Kind.DATA and position < end:
                yield _Run(position // CLUSTER, clusters_of(end - position), -1)

    def unchanged(self, held: Unchanged) -> int:
        """Bytes of `held` that the chain holds as well."""
        return sum(min(end, self.virtual_size) - offset for offset, end, _ in self._extents(held))

    def _extents(self, held: Unchanged) -> Iterator[tuple[int, int, Kind]]:
        # A disk that has grown since: the cluster at its old end, and what follows, is not in the chain.
        grown = held.virtual_size > self.virtual_size
        limit = self.virtual_size // CLUSTER * CLUSTER if grown else clusters_of(self.virtual_size) * CLUSTER
        for offset, length, kind in held.extents:
            if offset < limit:
                yield offset, min(offset + length, limit), kind

    def _whole(self, first: int, count: int, index: int) -> Iterator[_Run]:
        """Without clusters that are cut: nobody has a digest of what remains of them."""
        for number in range(count) if self._merged.cut else ():
            if index + number in self._merged.cut:
                if number:
                    yield _Run(first, number, index)
                yield from self._whole(first + number + 1, count - number - 1, index + number + 1)
                return
        if count:
            yield _Run(first, count, index)

    def digests(self) -> int:
        """A descriptor of the file of digests, in the order of the chain's data clusters; the caller closes it."""
        return os.open(self._sums, os.O_RDONLY | os.O_CLOEXEC)


def due(datastore: Datastore, image: Image, ctx: Context, *, disks: Sequence[str] = ()) -> Mapping[str, Due]:
    """What the last increment of `image` would restore, by disk ID: of these disks, or of all that it holds.

    It may take long, so it is looked up before the guest is held. NotFound for a disk that the increment has not;
    IntegrityError for a chain that is missing, changed, out of order or another VM's.
    """
    ctx.progress.phase("look")
    backups = open_chain(datastore, image, lineage(image), ctx)
    parts = {part.id: part for part in backups[-1].manifest.disks}
    unknown = sorted(set(disks) - set(parts))
    if unknown:
        raise NotFound(
            f"increment {backups[-1].increment.id} of image {image.number} holds no disk {', '.join(unknown)}",
            f"It holds: {', '.join(parts)}.",
        )
    return {disk: Due(backups, part, ctx) for disk, part in parts.items() if disk in (disks or parts)}


def compare(
    known: Mapping[str, Due], held: Sequence[Unchanged], ctx: Context, *, sample: float
) -> tuple[ComparedDisk, ...]:
    """Compare the share `sample` (1: all) of what is said not to have changed, chosen at random, with what is `known`.

    A difference does not end it. Every connection to the guest's disks is closed when it returns.
    """
    runs = [list(known[one.id].runs(one)) if one.blocks is not None else [] for one in held]
    shares = [_share(these, sample) for these in runs]
    due_ = sum(sum(run.clusters for run in these) * share for these, share in zip(runs, shares, strict=True))
    ctx.progress.phase("compare", int(due_) * CLUSTER)
    found: list[ComparedDisk] = []
    for one, these, share in zip(held, runs, shares, strict=True):
        if one.blocks is None:
            found.append(ComparedDisk(id=one.id, virtual_size=one.virtual_size, why_not=one.why_not))
            continue
        before = sum(disk.compared for disk in found)
        found.append(_compared(known[one.id], one, _chosen(these, share), ctx, before))
    return tuple(found)


def _share(runs: Sequence[_Run], sample: float) -> float:
    total = sum(run.clusters for run in runs)
    return min(1.0, max(sample, LEAST / total)) if total else 1.0


def _chosen(runs: Sequence[_Run], share: float) -> Iterator[_Run]:
    """Runs of at most `_STEP` clusters, each cluster chosen with the probability `share`."""
    for first, count, index in runs:
        start = -1
        for number in range(count + 1):
            taken = number < count and (share >= 1 or random.random() < share)  # noqa: S311 - a sample, no secret
            if start >= 0 and (not taken or number - start == _STEP):
                yield _Run(first + start, number - start, index if index < 0 else index + start)
                start = -1
            if taken and start < 0:
                start = number


def _compared(known: Due, held: Unchanged, chosen: Iterator[_Run], ctx: Context, before: int) -> ComparedDisk:
    differing: list[tuple[int, int]] = []
    size = min(known.virtual_size, held.virtual_size)
    done = 0
    assert held.blocks is not None
    waiting: deque[tuple[_Run, bytearray, Pending]] = deque()
    sums = known.digests()
    with ExitStack() as stack:
        stack.callback(os.close, sums)
        reader = held.blocks.connect()
        stack.callback(reader.close)
        with ctx.on_cancel(reader.close):

            def settle() -> None:
                nonlocal done
                run, buffer, pending = waiting.popleft()
                try:
                    pending.result()
                finally:
                    ctx.check()  # a cancel closes the connection, which is not what the user is told
                for cluster in _wrong(run, buffer, sums):
                    _add(differing, cluster * CLUSTER, min(CLUSTER, size - cluster * CLUSTER))
                done += min(run.clusters * CLUSTER, size - run.first * CLUSTER)
                ctx.progress.done(before + done)

            for run in chosen:
                if len(differing) >= _MOST_RANGES:
                    break
                buffer = bytearray(run.clusters * CLUSTER)  # a cluster at the end of a disk is filled up with zeros
                wanted = memoryview(buffer)[: size - run.first * CLUSTER]
                waiting.append((run, buffer, reader.submit(run.first * CLUSTER, wanted)))
                if len(waiting) >= _AHEAD:
                    settle()
            while waiting:
                settle()
    return ComparedDisk(
        id=held.id,
        virtual_size=held.virtual_size,
        unchanged=known.unchanged(held),
        compared=done,
        differing=tuple(differing[:_MOST_RANGES]),
    )


def _wrong(run: _Run, buffer: bytearray, sums: int) -> Iterator[int]:
    """The clusters of the guest's disk that are not what the chain has."""
    if run.at < 0:
        zeros = bytes(CLUSTER)
        for number in range(run.clusters):
            if buffer[number * CLUSTER : (number + 1) * CLUSTER] != zeros:
                yield run.first + number
        return
    found = digests(memoryview(buffer))
    wanted = os.pread(sums, run.clusters * DIGEST, run.at * DIGEST)
    for number in range(run.clusters):
        at = slice(number * DIGEST, (number + 1) * DIGEST)
        if found[at] != wanted[at]:
            yield run.first + number


def _add(ranges: list[tuple[int, int]], offset: int, length: int) -> None:
    if ranges and sum(ranges[-1]) == offset:
        ranges[-1] = (ranges[-1][0], ranges[-1][1] + length)
    else:
        ranges.append((offset, length))
