"""Reading backups back: what a datastore holds of an image, held against the digests taken from the guest's disks."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from backupcore.disk.extents import CLUSTER
from backupcore.disk.parallel import in_parallel
from backupcore.disk.spans import MOST
from backupcore.disk.stored import StoredDisk, read_exactly
from backupcore.disk.table import DIGEST, digests
from backupcore.errors import ContractViolation, IntegrityError, NotFound, UnsupportedOperation
from backupcore.opened import Opened, checked, open_increment

if TYPE_CHECKING:
    from backupcore.context import Context
    from backupcore.datastore import Datastore
    from backupcore.disk.qcow2 import Layout
    from backupcore.disk.scattered import ScatteredLayout
    from backupcore.manifest import DiskPart
    from backupcore.model import Artifact, Image, Increment

__all__ = ["Verified", "tables_of", "verify", "verify_disk"]

_STEP = 16  # clusters read at once
_DAMAGE = (IntegrityError, NotFound, ContractViolation, UnsupportedOperation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was found of one increment: how many bytes were read back, and what is wrong with it ("" if nothing)."""

    increment: Increment
    read: int
    problem: str


def verify(
    datastore: Datastore, image: Image, chain: Sequence[Increment], ctx: Context, *, sample: float = 1.0
) -> list[Verified]:
    """Read the increments in `chain` (oldest first) back: manifest, links, sizes, small artifacts, tables and sums of
    all, and of the data the share `sample` (1: every cluster).

    Where a datastore can only be read forward, all data are read whatever the share. Damage does not end it: every
    increment is looked at, and one whose parent cannot be read, or that builds on a damaged disk, says so. What is not
    damage (the datastore is away) raises.
    """
    ctx.progress.phase("verify", sum(increment.size for increment in chain))
    found: list[Verified] = []
    opened: dict[int, Opened] = {}
    harmed: dict[int, set[str]] = {}  # the disks that cannot be restored, by increment
    done = 0
    for increment in chain:
        read = 0

        def advance(count: int, before: int = done) -> None:
            nonlocal read
            read += count
            ctx.progress.done(before + read)

        try:
            backup = open_increment(datastore, image, increment, _parent(increment, opened), ctx)
            opened[increment.id] = backup
            found_of = _contents(backup, ctx, sample, advance)
            below = {one.id for one in backup.manifest.disks if not one.whole} & harmed.get(increment.pid, set())
            harmed[increment.id] = found_of.disks | below
            problem = found_of.problem
            if below and not problem:
                names = ", ".join(sorted(below))
                problem = f"it builds on increment {increment.pid}, of which disk {names} cannot be restored"
        except _DAMAGE as error:
            ctx.check()
            problem = error.in_full
        found.append(Verified(increment=increment, read=read, problem=problem))
        done += increment.size
        ctx.progress.done(done)
    return found


def _parent(increment: Increment, opened: Mapping[int, Opened]) -> Opened | None:
    if increment.pid >= 0 and increment.pid not in opened:
        raise IntegrityError(f"increment {increment.pid}, which it builds on, is damaged or missing")
    return opened.get(increment.pid)


class _Contents(NamedTuple):
    """The first thing that is wrong with the contents of an increment ("" if nothing is), and the damaged disks."""

    problem: str
    disks: set[str]


def _contents(backup: Opened, ctx: Context, sample: float, advance: Callable[[int], None]) -> _Contents:
    sums = {part.sums for part in backup.manifest.disks}
    sizes = {part.name: part.size for part in backup.manifest.artifacts}
    problems: list[str] = []
    disks: set[str] = set()
    for part in backup.manifest.artifacts:
        if part.name not in sums:
            try:
                advance(len(backup.small(part.name, part.size, part.digest)))
            except _DAMAGE as error:
                ctx.check()
                problems.append(error.in_full)
    for disk in backup.manifest.disks:
        what = f"increment {backup.increment.id} (source {backup.increment.source})"
        try:
            artifact = backup.artifact(disk.artifact, disk.size)
            with checked(backup.artifact(disk.sums, sizes[disk.sums]), disk.sums_digest, ctx.folder) as due:
                advance(sizes[disk.sums])
                verify_disk(artifact, disk, due, ctx, what=what, sample=sample, advance=advance)
        except _DAMAGE as error:
            ctx.check()
            problems.append(error.in_full)
            disks.add(disk.id)
    return _Contents(next(iter(problems), ""), disks)


def verify_disk(
    artifact: Artifact,
    part: DiskPart,
    sums: BinaryIO,
    ctx: Context,
    *,
    what: str,
    sample: float,
    least: int = 1,
    largest: int | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """IntegrityError unless the tables of a disk, and the share `sample` of its data, are what its sums say."""
    layout = tables_of(artifact, part, f"{what}, disk {part.id}")
    advance(layout.data_offset)

    def due_from(first: int, most: int) -> bytes:
        sums.seek(first * DIGEST)
        return sums.read(min(most, layout.clusters - first) * DIGEST)

    def compare(first: int, data: memoryview, due: bytes) -> None:
        found = digests(data)
        if found != due:
            wrong = next(at for at in range(0, len(found), DIGEST) if found[at:][:DIGEST] != due[at:][:DIGEST])
            raise IntegrityError(
                f"{what}, disk {part.id}: data cluster {first + wrong // DIGEST} is not what was stored",
                "Restore an older increment, or from another datastore.",
            )

    def read(job: tuple[int, bytes], buffer: memoryview) -> int:
        first, due = job
        data = buffer[: min(MOST, layout.clusters - first) * CLUSTER]
        if artifact.read_into(layout.data_offset + first * CLUSTER, data) != len(data):
            raise IntegrityError(f"{what}, disk {part.id} ends early")
        compare(first, data, due)
        return len(data)

    if sample >= 1 and artifact.seekable:
        jobs = ((first, due_from(first, MOST)) for first in range(0, layout.clusters, MOST))
        for count in in_parallel(jobs, read, ctx.check, size=MOST * CLUSTER):
            advance(count)
    elif sample and not artifact.seekable:
        with artifact.open() as file:
            for _ in range(0, layout.data_offset, CLUSTER):
                read_exactly(file, CLUSTER, what)
            for first in range(0, layout.clusters, _STEP):
                ctx.check()
                data = read_exactly(file, min(_STEP, layout.clusters - first) * CLUSTER, what)
                compare(first, memoryview(data), due_from(first, _STEP))
                advance(len(data))
            file.read(1)  # one that goes on raises
    elif sample:
        wanted = max(least, int(layout.clusters * sample))
        count = min(layout.clusters, wanted if largest is None else min(largest, wanted))
        for first in sorted(random.sample(range(layout.clusters), count)):
            ctx.check()
            data = artifact.read_at(layout.data_offset + first * CLUSTER, CLUSTER)
            compare(first, memoryview(data), due_from(first, 1))
            advance(len(data))


def tables_of(artifact: Artifact, part: DiskPart, name: str) -> Layout | ScatteredLayout:
    """The layout of a stored disk, its tables held against the manifest; `name` says whose it is in errors."""
    try:
        with artifact.open() as file:
            return StoredDisk.parse(
                file,
                part.size,
                virtual_size=part.virtual_size,
                tables_digest=bytes.fromhex(part.tables_digest),
                order=part.order,
            )
    except IntegrityError as error:
        raise IntegrityError(f"{name}: {error.message}", error.hint) from error
