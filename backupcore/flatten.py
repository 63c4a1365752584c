"""Flatten: the oldest increments of an image become one new full, which keeps the point and the ID of the last of them.

The result is made from the layers as it is read (`backupcore.merging`): nothing is copied to this host. Where the
driver can copy on its own side it is asked first, with the disks *as they lie* (`backupcore.disk.scattered`); otherwise
the result is stored as any backup is, compact and in guest order. The sources that were merged stay as they are: the
caller records the new one, once it is proved (`backupcore.proof`), and only then deletes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING

from blake3 import blake3

from backupcore import manifest as manifests
from backupcore.chain import lineage
from backupcore.errors import (
    BackupError,
    Cancelled,
    ConfigError,
    ContractViolation,
    IntegrityError,
    TargetFull,
)
from backupcore.merging import MOST_STREAMS, Merged, MergedDisk
from backupcore.model import BackupRun, Image, Increment, SourceRef, Stored, Type, new_id
from backupcore.opened import Opened, open_chain
from backupcore.proof import prove, stored_manifest, take_back

if TYPE_CHECKING:
    from backupcore.context import Context
    from backupcore.datastore import Datastore

__all__ = ["Flattened", "find", "flatten"]

_SAMPLE = 0.01  # of the clusters that a store copied on its own side, read back


@dataclass(frozen=True, slots=True, kw_only=True)
class Flattened:
    """A new full that is stored and proved: its row, and those that it replaces, oldest first.

    `copied` is true where the store copied on its own side, `stored` how many bytes it grew by (None if not known).
    """

    increment: Increment
    replaces: tuple[Increment, ...]
    began: datetime
    stored: int | None = None
    copied: bool = False
    seconds: float = 0.0


def flatten(
    datastore: Datastore,
    image: Image,
    to: int,
    ctx: Context,
    *,
    host: str,
    installation: str = "",
    everything: bool = False,
    room: int | None = None,
    stored: Callable[[Stored], None] = lambda stored: None,
) -> Flattened:
    """Merge the increments of `image` up to number `to` into a new full, and prove it. The old ones stay.

    Where the layers can only be read forward at most `MOST_STREAMS` of them are merged: the result then stands for an
    earlier increment than `to`, and the caller goes on. `host` and `installation` say who does it. `everything` reads
    all of the result back. `room` is what it may take at most, as far as the caller knows. `stored` is told once the
    result is in the datastore, before the proof: if that cannot be had then, `find` looks for it later.

    ConfigError where there is nothing to merge; TargetFull where the datastore says that it has no room; IntegrityError
    where a layer is not what was written, or the result is not what was sent. Nothing is stored then.
    """
    started = time.monotonic()
    ctx.progress.phase("look")
    chain = _steps(lineage(image, to), image)
    backups = open_chain(datastore, image, chain, ctx)
    backups = _limited(backups)
    began = image.began or chain[0].date
    run = _run(datastore, image, backups, host, installation)
    disks = [MergedDisk(backups, part, ctx) for part in backups[-1].manifest.disks]
    kept = None
    whose = f"driver {datastore.kind} of datastore {datastore.name}"
    if datastore.flattens:
        merged = Merged(backups, disks, run, ctx, began=began, as_it_lies=True)
        if not merged.wasteful and not merged.cut:
            _check_room(datastore, merged.size, room, ctx)
            ctx.progress.phase("flatten", merged.size)
            kept = _keep(merged, ctx, lambda: datastore.flatten(merged, run, ctx), stored, whose)
    copied = kept is not None
    if kept is None:
        merged = Merged(backups, disks, run, ctx, began=began, as_it_lies=False)
        _check_room(datastore, merged.size, room, ctx)
        ctx.progress.phase("flatten", merged.size)
        kept = _keep(merged, ctx, lambda: datastore.backup(merged.artifacts, run, ctx), stored, whose)
    assert kept is not None
    ctx.progress.phase("verify")
    try:
        sample = 1.0 if everything else _SAMPLE if copied else 0.0
        prove(datastore, kept.source, merged.manifest, ctx, sample=sample)
    except IntegrityError:
        take_back(datastore, kept.source, merged.manifest, ctx)
        raise
    return Flattened(
        increment=_row(merged.manifest, merged.size, kept.source, backups[-1].increment),
        replaces=tuple(backup.increment for backup in backups),
        began=began,
        stored=kept.stored,
        copied=copied,
        seconds=time.monotonic() - started,
    )


def find(
    datastore: Datastore, image: Image, known: Iterable[SourceRef], ctx: Context, *, everything: bool = False
) -> Flattened | None:
    """The result of a flatten of `image` that was stored, and then interrupted before it was recorded; proved.

    `known` are the sources that the catalog has. None if there is no such result; one that does not stand the proof is
    left where it is.
    """
    there = {source.token for source in known}
    by_id = {increment.id: increment for increment in image.increments}
    for listed in datastore.sources(ctx):
        labels = listed.labels
        number = labels.get("number", "")
        last = by_id.get(int(number)) if number.isascii() and number.isdigit() else None
        if (
            listed.source.token in there
            or labels.get("image") != image.uuid
            or labels.get("type") != Type.FULL.value
            or last is None
            or labels.get("point") != last.point
        ):
            continue
        try:
            return _adopted(datastore, image, last, listed.source, ctx, sample=1.0 if everything else _SAMPLE)
        except IntegrityError as error:
            ctx.log.warning("source %s of an interrupted flatten is left alone: %s", listed.source, error)
    return None


def _adopted(
    datastore: Datastore, image: Image, last: Increment, source: SourceRef, ctx: Context, *, sample: float
) -> Flattened:
    artifacts = datastore.artifacts(source, ctx)
    data = stored_manifest(artifacts, source)
    manifest = manifests.parse(data, f"source {source}")
    chain = lineage(image, last.id)
    due = ([one.point for one in chain], last.digest, image.vm.uuid, image.uuid)
    if (list(manifest.replaces), manifest.stands_for, manifest.vm.uuid, manifest.image) != due:
        raise IntegrityError(f"source {source} does not stand for increment {last.id} of image {image.number}")
    prove(datastore, source, data, ctx, sample=sample)
    size = sum(artifact.size for artifact in artifacts.values())
    return Flattened(
        increment=_row(data, size, source, last), replaces=chain, began=image.began or chain[0].date, copied=True
    )


def _steps(chain: Sequence[Increment], image: Image) -> Sequence[Increment]:
    if len(chain) < 2 or chain[0] != image.increments[0]:
        raise ConfigError(
            f"increment {chain[-1].id} of image {image.number} is its full: there is nothing to merge",
            f"See: vmkeep image show {image.number}",
        )
    return chain


def _limited(backups: list[Opened]) -> list[Opened]:
    """As many of the backups as can be read at once."""
    disks = (backup.artifacts.get(part.artifact) for backup in backups for part in backup.manifest.disks)
    if all(disk is None or disk.seekable for disk in disks):
        return backups
    # Some stores read two files at once, so two disks' layers may be open beside each other.
    limit = MOST_STREAMS if max(len(backup.manifest.disks) for backup in backups) < 2 else MOST_STREAMS // 2
    return backups[:limit]


def _run(datastore: Datastore, image: Image, backups: Sequence[Opened], host: str, installation: str) -> BackupRun:
    """The run under which a driver stores the result."""
    first, last = backups[0].increment, backups[-1].increment
    return BackupRun(
        id=new_id(),
        vm=image.vm,
        host=host,
        datastore=datastore.name,
        image=image.uuid,
        number=last.id,
        point=last.point,
        type=Type.FULL,
        reason=f"flattened: increments {first.id} to {last.id}",
        builds_on=tuple(backup.increment.source for backup in backups),
        tracked=False,
        date=last.date,
        installation=installation,
    )


def _keep(
    merged: Merged, ctx: Context, store: Callable[[], Stored | None], told: Callable[[Stored], None], whose: str
) -> Stored | None:
    """Let `store` read the result, to its end; what it raises is what ended it. `whose` driver it is."""
    try:
        with ctx.on_cancel(merged.close):
            stored = store()
        if stored is not None:
            if stored.source in merged.sources:
                raise ContractViolation(f"{whose} returned source {stored.source}, one of those that were merged")
            merged.check_complete()
            told(stored)
            len(merged.manifest)  # known now, and not any more once the layers are closed
        ctx.check()
    except BackupError as error:
        if ctx.failure is not None and error is not ctx.failure:
            raise ctx.failure from error
        if ctx.cancelled and not isinstance(error, Cancelled):
            raise Cancelled("cancelled") from error
        raise
    finally:
        merged.close()
    return stored


def _check_room(datastore: Datastore, size: int, room: int | None, ctx: Context) -> None:
    free = datastore.usage(ctx).free
    needed = size if room is None else min(size, room)
    if free is not None and free < needed:
        raise TargetFull(
            f"datastore {datastore.name}: a flatten may take up to {needed} bytes, and {free} are free",
            "The old increments go only when the new full is proved. Make room there, then run it again.",
        )


def _row(data: bytes, size: int, source: SourceRef, last: Increment) -> Increment:
    manifest = manifests.parse(data, f"source {source}")
    return Increment(
        id=manifest.number,
        pid=-1,
        type=Type.FULL,
        point=manifest.point,
        source=source,
        size=size,
        date=last.date,  # the manifest's has no more than milliseconds
        consistency=manifest.consistency,
        reason=manifest.reason,
        digest=blake3(data).hexdigest(),
        # What the catalog knows of a disk beyond the manifest stays: the next increment is taken against this row.
        disks=tuple(replace(disk, whole=True, reason="") for disk in last.disks),
    )
