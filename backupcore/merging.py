"""Several increments as the one full that they make up, lazy: disk by disk, and as all the artifacts of a backup."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from blake3 import blake3

from backupcore import manifest as manifests
from backupcore.bundle import Bundle, draft
from backupcore.disk.extents import CLUSTER
from backupcore.disk.merged import MergedArtifact, MergedBlocks, MergedLayer
from backupcore.disk.parallel import REQUESTS, each
from backupcore.disk.qcow2 import DiskArtifact, Layout
from backupcore.disk.scattered import ScatteredLayout
from backupcore.disk.stored import read_exactly
from backupcore.disk.table import DIGEST
from backupcore.disk.winners import Run, Winners, winners, winners_as_they_lie
from backupcore.errors import UnsupportedOperation, from_os_error
from backupcore.model import Artifact, BackupRun, BytesArtifact, Copy, Disk, LeftOut, Literal, Prepared, stream
from backupcore.opened import Opened, checked, parts_of
from backupcore.verify import tables_of

if TYPE_CHECKING:
    from backupcore.context import Context
    from backupcore.manifest import DiskPart

__all__ = ["MOST_DEAD", "MOST_STREAMS", "Merged", "MergedDisk"]

MOST_STREAMS = 8
"""Layers that are open at a time where they can only be read forward. A longer chain is flattened in several steps."""

MOST_DEAD = 0.25
"""The share of dead clusters above which a disk is not left as it lies any more, but written anew."""

_STEP = 16  # clusters read at once


class MergedDisk:
    """One disk of the result: its layers, oldest first, with their tables read."""

    def __init__(self, backups: Sequence[Opened], part: DiskPart, ctx: Context) -> None:
        self.part = part
        self.parts = parts_of(backups, part.id)[::-1]
        self.layers: list[MergedLayer] = []
        self.layouts: list[Layout | ScatteredLayout] = []
        seekable = all(backup.artifact(layer.artifact, layer.size).seekable for backup, layer in self.parts)
        # Several at once where the store can seek: it may be far away, and a chain has many.
        self._requests = REQUESTS if seekable else 1
        for layer, layout in each(lambda one: self._opened(*one, ctx), self.parts, self._requests):
            self.layers.append(layer)
            self.layouts.append(layout)

    def _opened(self, backup: Opened, layer: DiskPart, ctx: Context) -> tuple[MergedLayer, Layout | ScatteredLayout]:
        ctx.check()
        name = f"increment {backup.increment.id} (source {backup.increment.source}), disk {layer.id}"
        artifact = backup.artifact(layer.artifact, layer.size)
        layout = tables_of(artifact, layer, name)
        if isinstance(layout, ScatteredLayout) and not artifact.seekable:
            raise UnsupportedOperation(
                f"{name} lies in the order in which a store copied it, and can only be read forward here",
                "Flatten it in the datastore in which it was made.",
            )
        return MergedLayer(name, artifact, layout.data_offset), layout

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
                of_layer = merged.runs.by_layer()
                for _ in each(lambda one: self._gather(*one, file, folder, ctx), of_layer, self._requests):
                    pass
            finally:
                os.close(file)
        except OSError as error:
            raise from_os_error(error, f"the sums of a flatten, {merged.layout.clusters * DIGEST} bytes") from error
        return MergedBlocks(merged, self.layers, path)

    def _gather(self, number: int, runs: Iterable[Run], file: int, folder: Path, ctx: Context) -> None:
        """Put the digests of one layer's runs where they belong in `file`."""
        ctx.check()
        with self._sums(number, folder) as sums:
            for run in runs:
                sums.seek(run.at * DIGEST)
                due = read_exactly(sums, run.clusters * DIGEST, f"{self.layers[number].name}: its sums")
                _put(file, due, run.first * DIGEST)

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


def _put(file: int, data: bytes, offset: int) -> None:
    left = memoryview(data)
    while left:
        done = os.pwrite(file, left, offset)
        left, offset = left[done:], offset + done
