"""Flatten: the oldest increments of an image become one new full, which keeps the point and the ID of the last of them.

The result is made from the layers as it is read: nothing is copied to this host. Where the driver can copy on its own
side it is asked first, with the disks *as they lie* (`backupcore.disk.scattered`); otherwise the result is stored as
any backup is, compact and in guest order. The sources that were merged stay as they are: the caller records the new
one, and only then deletes them.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from blake3 import blake3

from backupcore import manifest as manifests
from backupcore.bundle import Bundle, draft
from backupcore.chain import lineage
from backupcore.disk.extents import CLUSTER
from backupcore.disk.merged import MergedArtifact, MergedBlocks, MergedLayer
from backupcore.disk.qcow2 import DiskArtifact, Layout
from backupcore.disk.scattered import ScatteredLayout
from backupcore.disk.stored import read_exactly
from backupcore.disk.table import DIGEST
from backupcore.disk.winners import Winners, winners, winners_as_they_lie
from backupcore.errors import (
    BackupError,
    Cancelled,
    ConfigError,
    ContractViolation,
    IntegrityError,
    TargetFull,
    UnsupportedOperation,
    from_os_error,
)
from backupcore.model import (
    Artifact,
    BackupRun,
    BytesArtifact,
    Copy,
    Disk,
    Image,
    Increment,
    LeftOut,
    Literal,
    Prepared,
    SourceRef,
    Stored,
    Type,
    new_id,
    stream,
)
from backupcore.opened import Opened, checked, open_chain, parts_of
from backupcore.verify import tables_of, verify_disk

if TYPE_CHECKING:
    from backupcore.context import Context
    from backupcore.datastore import Datastore
    from backupcore.manifest import DiskPart

__all__ = ["MOST_DEAD", "MOST_STREAMS", "Flattened", "Merged", "MergedDisk", "find", "flatten"]

MOST_STREAMS = 8
"""Layers that are open at a time where they can only be read forward. A longer chain is flattened in several steps."""

MOST_DEAD = 0.25
"""The share of dead clusters above which a disk is not left as it lies any more, but written anew."""

_STEP = 16  # clusters read at once
_SAMPLE = 0.01  # of the clusters that a store copied on its own side, read back
_LEAST, _LARGEST = 64, 4096  # ... but so many at least, and at most


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


class MergedDisk:
    """One disk of the result: its layers, oldest first, with their tables read."""

    def __init__(self, backups: Sequence[Opened], part: DiskPart, ctx: Context) -> None:
        self.part = part
        self.parts = parts_of(backups, part.id)[::-1]
        self.layers: list[MergedLayer] = []
        self.layouts: list[Layout | ScatteredLayout] = []
        for backup, layer in self.parts:
            ctx.check()
            name = f"increment {backup.increment.id} (source {backup.increment.source}), disk {part.id}"
            artifact = backup.artifact(layer.artifact, layer.size)
            layout = tables_of(artifact, layer, name)
            if isinstance(layout, ScatteredLayout) and not artifact.seekable:
                raise UnsupportedOperation(
                    f"{name} lies in the order in which a store copied it, and can only be read forward here",
                    "Flatten it in the datastore in which it was made.",
                )
            self.layouts.append(layout)
            self.layers.append(MergedLayer(name, artifact, layout.data_offset))

    @property
    def disk(self) -> Disk:
        part = self.part
        return Disk(id=part.id, artifact=part.artifact, virtual_size=part.virtual_size, whole=True)

    def blocks(self, merged: Winners, folder: Path, ctx: Context) -> MergedBlocks:
        """The data, with their digests gathered from the layers' sums in the result's file order."""
        order = "file" if isinstance(merged.layout, ScatteredLayout) else "guest"
        path = folder / f"merged.{order}.sums.{self.part.id}"
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(file, 0, max(1, merged.layout.clusters * DIGEST))
                os.ftruncate(file, merged.layout.clusters * DIGEST)
                for number, runs in merged.runs.by_layer():
                    ctx.check()
                    with self._sums(number, folder) as sums:
                        for run in runs:
                            sums.seek(run.at * DIGEST)
                            due = read_exactly(sums, run.clusters * DIGEST, f"{self.layers[number].name}: its sums")
                            _put(file, due, run.first * DIGEST)
            finally:
                os.close(file)
        except OSError as error:
            raise from_os_error(error, f"the sums of a flatten, {merged.layout.clusters * DIGEST} bytes") from error
        return MergedBlocks(merged, self.layers, path)

    def _sums(self, number: int, folder: Path) -> BinaryIO:
        backup, layer = self.parts[number]
        listed = {entry.name: entry for entry in backup.manifest.artifacts}[layer.sums]
        return checked(backup.artifact(layer.sums, listed.size), layer.sums_digest, folder)


class Merged:
    """The result of a flatten, lazy: `backupcore.model.Merge` for a driver's hook, and for the default.

    Its disks are those of the last of `backups`, oldest first. With `as_it_lies` their data lie as a store can copy
    them, and `pieces` says from where; otherwise they are compact and in guest order.
    """

    def __init__(
        self,
        backups: Sequence[Opened],
        disks: Sequence[MergedDisk],
        run: BackupRun,
        ctx: Context,
        *,
        began: datetime,
        as_it_lies: bool,
    ) -> None:
        last = backups[-1]
        self.sources = tuple(backup.increment.source for backup in backups)
        self.as_it_lies = as_it_lies
        self._last = last
        self._ctx = ctx
        self._run = run
        self._winners = {one.part.id: (winners_as_they_lie if as_it_lies else winners)(one.layouts) for one in disks}
        self._disks = disks
        self._entries: dict[str, Any] = {
            "replaces": [backup.increment.point for backup in backups],
            "stands_for": last.increment.digest,
            "began": began.astimezone(UTC).isoformat(timespec="milliseconds"),
        }

    @property
    def wasteful(self) -> bool:
        """Whether too many clusters would be dead: of all disks, or so many of one that the reader refuses it."""
        merged = self._winners.values()
        total = sum(one.layout.clusters for one in merged)
        if sum(one.dead for one in merged) > MOST_DEAD * total:
            return True
        return any(one.dead > one.layout.clusters - one.dead for one in merged)

    @property
    def cut(self) -> bool:
        """Whether a cluster is not a layer's own: its digest is not known, and no store can copy it."""
        return any(merged.cut for merged in self._winners.values())

    @cached_property
    def _blocks(self) -> Mapping[str, MergedBlocks]:
        return {one.part.id: one.blocks(self._winners[one.part.id], self._ctx.folder, self._ctx) for one in self._disks}

    @cached_property
    def _made(self) -> Bundle | _AsItLies:
        manifest = self._last.manifest
        small = [
            BytesArtifact(part.name, self._last.small(part.name, part.size, part.digest))
            for part in manifest.artifacts
            if not part.name.startswith("sums.")
        ]
        disks: list[Artifact] = []
        for one in self._disks:
            merged, blocks = self._winners[one.part.id], self._blocks[one.part.id]
            if isinstance(merged.layout, Layout):
                disks.append(DiskArtifact(one.part.artifact, merged.layout, blocks))
            else:
                disks.append(MergedArtifact(one.part.artifact, blocks))
        prepared = Prepared(
            artifacts=(*disks, *small),
            date=manifest.date,
            consistency=manifest.consistency,
            frozen_seconds=manifest.frozen_seconds,
            disks=tuple(one.disk for one in self._disks),
            left_out=tuple(LeftOut(id=left.id, reason=left.reason) for left in manifest.left_out),
            versions=manifest.versions,
        )
        if self.as_it_lies:
            return _AsItLies(prepared, self._run, small=small, blocks=self._blocks, merged=self._entries)
        return Bundle(prepared, self._run, self._ctx, merged=self._entries)

    @property
    def artifacts(self) -> Sequence[Artifact]:
        """The finished result, the manifest with it."""
        return self._made.artifacts

    @property
    def size(self) -> int:
        """Bytes of all artifacts together."""
        return sum(artifact.size for artifact in self.artifacts)

    @property
    def manifest(self) -> bytes:
        """The manifest. In guest order it is known once the disks were read."""
        return self._made.manifest.data()

    def pieces(self, artifact: Artifact) -> Iterator[Copy | Literal]:
        """The bytes of one of `artifacts` in order."""
        part = next((one for one in self._disks if one.part.artifact == artifact.name), None)
        copied = artifact.size if part is None else self._winners[part.part.id].layout.data_offset
        for offset in range(0, copied, _STEP * CLUSTER):
            yield Literal(data=artifact.read_at(offset, min(_STEP * CLUSTER, copied - offset)))
        if part is None:
            return
        merged = self._winners[part.part.id]
        if merged.cut:
            raise UnsupportedOperation(f"{artifact.name} cannot be copied: the disk was smaller in between")
        for run in merged.runs:
            backup, layer = part.parts[run.layer]
            offset = part.layers[run.layer].data_offset + run.at * CLUSTER
            length = run.clusters * CLUSTER
            yield Copy(source=backup.increment.source, artifact=layer.artifact, offset=offset, length=length)

    def check_complete(self) -> None:
        """ContractViolation unless a driver that was given `artifacts` has read all of them."""
        if isinstance(self._made, Bundle):
            self._made.check_complete()

    def close(self) -> None:
        """Let go of the layers."""
        self._made.close()


class _AsItLies:
    """The artifacts of a result whose data no one here reads, so that their sums are those that the layers had."""

    def __init__(
        self,
        prepared: Prepared,
        run: BackupRun,
        *,
        small: Sequence[BytesArtifact],
        blocks: Mapping[str, MergedBlocks],
        merged: Mapping[str, Any],
    ) -> None:
        sums = {disk: _SumsFile(f"sums.{disk}", one.sums) for disk, one in blocks.items()}
        self._disks = [artifact for artifact in prepared.artifacts if isinstance(artifact, MergedArtifact)]
        sizes = {disk: one.merged.layout.size for disk, one in blocks.items()}
        tables = {disk: one.merged.layout.tables_digest() for disk, one in blocks.items()}
        content = draft(prepared, run, small, sizes, tables)
        for part in content["disks"]:
            part["order"] = "file"
        self.manifest = manifests.ManifestArtifact({**content, **merged}, sums)
        everything = [*self._disks, *sums.values(), *small, self.manifest]
        self.artifacts: tuple[Artifact, ...] = tuple(sorted(everything, key=lambda artifact: artifact.name))

    def close(self) -> None:
        for disk in self._disks:
            disk.close()


class _SumsFile(Artifact):
    """Sums that are known already."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.size = path.stat().st_size
        self._path = path

    def open(self) -> BinaryIO:
        return stream(self)

    def read_at(self, offset: int, length: int) -> bytes:
        with self._path.open("rb") as file:
            return os.pread(file.fileno(), length, offset)

    def digest(self) -> bytes:
        """BLAKE3 over all of it."""
        hasher = blake3()
        with self.open() as file:
            while block := file.read(1 << 20):
                hasher.update(block)
        return hasher.digest()


def flatten(
    datastore: Datastore,
    image: Image,
    to: int,
    ctx: Context,
    *,
    host: str,
    everything: bool = False,
    room: int | None = None,
    stored: Callable[[Stored], None] = lambda stored: None,
) -> Flattened:
    """Merge the increments of `image` up to number `to` into a new full, and prove it. The old ones stay.

    Where the layers can only be read forward at most `MOST_STREAMS` of them are merged: the result then stands for an
    earlier increment than `to`, and the caller goes on. `everything` reads all of the result back. `room` is what it
    may take at most, as far as the caller knows. `stored` is told once the result is in the datastore, before the
    proof: if that cannot be had then, `find` looks for it later.

    ConfigError where there is nothing to merge; TargetFull where the datastore says that it has no room; IntegrityError
    where a layer is not what was written, or the result is not what was sent. Nothing is stored then.
    """
    started = time.monotonic()
    ctx.progress.phase("look")
    chain = _steps(lineage(image, to), image)
    backups = open_chain(datastore, image, chain, ctx)
    backups = _limited(backups)
    began = image.began or chain[0].date
    run = _run(datastore, image, backups, host)
    disks = [MergedDisk(backups, part, ctx) for part in backups[-1].manifest.disks]
    kept = None
    if datastore.flattens:
        merged = Merged(backups, disks, run, ctx, began=began, as_it_lies=True)
        if not merged.wasteful and not merged.cut:
            _check_room(datastore, merged.size, room, ctx)
            ctx.progress.phase("flatten", merged.size)
            kept = _keep(merged, ctx, lambda: datastore.flatten(merged, run, ctx), stored)
    copied = kept is not None
    if kept is None:
        merged = Merged(backups, disks, run, ctx, began=began, as_it_lies=False)
        _check_room(datastore, merged.size, room, ctx)
        ctx.progress.phase("flatten", merged.size)
        kept = _keep(merged, ctx, lambda: datastore.backup(merged.artifacts, run, ctx), stored)
    assert kept is not None
    ctx.progress.phase("verify")
    try:
        sample = 1.0 if everything else _SAMPLE if copied else 0.0
        verify(datastore, kept.source, merged.manifest, ctx, sample=sample)
    except IntegrityError:
        _take_back(datastore, kept.source, merged.manifest, ctx)
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
    data = _manifest(artifacts, source)
    manifest = manifests.parse(data, f"source {source}")
    chain = lineage(image, last.id)
    due = ([one.point for one in chain], last.digest, image.vm.uuid, image.uuid)
    if (list(manifest.replaces), manifest.stands_for, manifest.vm.uuid, manifest.image) != due:
        raise IntegrityError(f"source {source} does not stand for increment {last.id} of image {image.number}")
    verify(datastore, source, data, ctx, sample=sample)
    size = sum(artifact.size for artifact in artifacts.values())
    return Flattened(
        increment=_row(data, size, source, last), replaces=chain, began=image.began or chain[0].date, copied=True
    )


def verify(datastore: Datastore, source: SourceRef, manifest: bytes, ctx: Context, *, sample: float) -> None:
    """IntegrityError unless `source` holds what `manifest` says: every size, every small artifact, all tables and sums,
    and of the data the share `sample` (1: all of it).
    """
    what = f"the new source {source}"
    artifacts = datastore.artifacts(source, ctx)
    if _manifest(artifacts, source) != manifest:
        raise IntegrityError(f"{what}: its manifest is not the one that was stored")
    parsed = manifests.parse(manifest, what)
    sizes = {part.artifact: part.size for part in parsed.disks} | {part.name: part.size for part in parsed.artifacts}
    found = {name: artifact.size for name, artifact in artifacts.items() if name != manifests.NAME}
    if found != sizes:
        wrong = sorted(name for name in found.keys() | sizes.keys() if found.get(name) != sizes.get(name))
        raise IntegrityError(f"{what}: missing, unknown, or of another size: {', '.join(wrong)}")
    sums = {part.sums for part in parsed.disks}
    for entry in parsed.artifacts:
        if entry.name not in sums:
            with artifacts[entry.name].open() as file:
                if blake3(file.read()).hexdigest() != entry.digest:
                    raise IntegrityError(f"{what}: {entry.name} is not what was stored")
    for part in parsed.disks:
        with checked(artifacts[part.sums], part.sums_digest, ctx.folder) as due:
            verify_disk(
                artifacts[part.artifact], part, due, ctx, what=what, sample=sample, least=_LEAST, largest=_LARGEST
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


def _run(datastore: Datastore, image: Image, backups: Sequence[Opened], host: str) -> BackupRun:
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
    )


def _take_back(datastore: Datastore, source: SourceRef, manifest: bytes, ctx: Context) -> None:
    """Delete a result that does not stand the proof: nobody knows of it, and all that it was made from is there.

    Only if it is ours by its manifest: a driver that is wrong may have answered with somebody else's source.
    """
    with contextlib.suppress(BackupError):
        if _manifest(datastore.artifacts(source, ctx), source) == manifest:
            datastore.delete([source], ctx)


def _keep(
    merged: Merged, ctx: Context, store: Callable[[], Stored | None], told: Callable[[Stored], None]
) -> Stored | None:
    """Let `store` read the result, to its end; what it raises is what ended it."""
    try:
        with ctx.on_cancel(merged.close):
            stored = store()
        if stored is not None:
            if stored.source in merged.sources:
                raise ContractViolation(f"the driver returned source {stored.source}, one of those that were merged")
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


def _manifest(artifacts: Mapping[str, Artifact], source: SourceRef) -> bytes:
    artifact = artifacts.get(manifests.NAME)
    if artifact is None or artifact.size > manifests.LIMIT:
        raise IntegrityError(f"source {source} has no manifest, or one larger than {manifests.LIMIT >> 20} MiB")
    with artifact.open() as file:
        return file.read()


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


def _put(file: int, data: bytes, offset: int) -> None:
    left = memoryview(data)
    while left:
        done = os.pwrite(file, left, offset)
        left, offset = left[done:], offset + done
