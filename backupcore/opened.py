"""The increments of a chain as their datastore holds them, each held against the catalog, its VM and its parent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING, BinaryIO, cast

from blake3 import blake3

from backupcore import manifest as manifests
from backupcore.disk.merge import Layer
from backupcore.disk.parallel import REQUESTS, each
from backupcore.errors import IntegrityError
from backupcore.model import Artifact, Image, Increment

if TYPE_CHECKING:
    from backupcore.context import Context
    from backupcore.datastore import Datastore
    from backupcore.manifest import DiskPart, Manifest

__all__ = ["Opened", "checked", "layers_of", "open_chain", "open_increment", "parts_of"]


@dataclass(frozen=True)
class Opened:
    """One increment as its datastore holds it, with its manifest checked."""

    increment: Increment
    manifest: Manifest
    artifacts: Mapping[str, Artifact]

    def artifact(self, name: str, size: int) -> Artifact:
        """The artifact of that name. IntegrityError if it is missing or has another size."""
        found = self.artifacts.get(name)
        if found is None or found.size != size:
            state = "is missing" if found is None else f"has {found.size} bytes instead of {size}"
            raise IntegrityError(
                f"increment {self.increment.id} (source {self.increment.source}): {name} {state}",
                "Restore another increment; a new image starts with: vmkeep backup --reset",
            )
        return found

    def small(self, name: str, size: int, digest: str) -> bytes:
        """All of an artifact that is no disk. IntegrityError if it was changed."""
        with self.artifact(name, size).open() as file:
            data = file.read()
        if blake3(data).hexdigest() != digest:
            raise IntegrityError(f"increment {self.increment.id} (source {self.increment.source}): {name} was changed")
        return data


def open_chain(datastore: Datastore, image: Image, chain: Sequence[Increment], ctx: Context) -> list[Opened]:
    """Every increment of the chain, oldest first, its manifest held against the catalog, the VM and its parent.

    Where the store can seek, several manifests are fetched at once: it may be far away.
    """
    backups = [open_increment(datastore, image, chain[0], None, ctx)]
    seekable = all(artifact.seekable for artifact in backups[0].artifacts.values())
    several = each(lambda one: _fetched(datastore, one, ctx), chain[1:], REQUESTS if seekable else 1)
    with closing(several) as fetched:
        for increment, (artifacts, data) in zip(chain[1:], fetched, strict=True):
            backups.append(_checked(image, increment, backups[-1], artifacts, data))
    return backups


def open_increment(
    datastore: Datastore, image: Image, increment: Increment, parent: Opened | None, ctx: Context
) -> Opened:
    """One increment, its manifest held against the catalog, the VM and its parent (None: it must be a full)."""
    return _checked(image, increment, parent, *_fetched(datastore, increment, ctx))


def _fetched(datastore: Datastore, increment: Increment, ctx: Context) -> tuple[Mapping[str, Artifact], bytes]:
    """The artifacts of an increment, and its manifest as it lies there."""
    what = _what(increment)
    ctx.check()
    artifacts = datastore.artifacts(increment.source, ctx)
    if manifests.NAME not in artifacts:
        raise IntegrityError(f"{what}: it has no manifest, so it is not complete")
    if artifacts[manifests.NAME].size > manifests.LIMIT:
        raise IntegrityError(f"{what}: the manifest is larger than {manifests.LIMIT >> 20} MiB")
    with artifacts[manifests.NAME].open() as file:
        return artifacts, file.read()


def _checked(
    image: Image, increment: Increment, parent: Opened | None, artifacts: Mapping[str, Artifact], data: bytes
) -> Opened:
    what = _what(increment)
    manifest = manifests.parse(data, what)
    if manifest.vm.uuid != image.vm.uuid:
        raise IntegrityError(f"{what}: it is a backup of another VM ({manifest.vm.name}, {manifest.vm.uuid})")
    if blake3(data).hexdigest() != increment.digest or manifest.point != increment.point:
        raise IntegrityError(f"{what}: it is not the backup that was recorded under this number")
    if not _builds_on(manifest, parent):
        raise IntegrityError(f"{what}: it does not build on increment {parent.increment.id if parent else 'none'}")
    return Opened(increment, manifest, artifacts)


def _what(increment: Increment) -> str:
    return f"increment {increment.id} (source {increment.source})"


def _builds_on(manifest: Manifest, parent: Opened | None) -> bool:
    if manifest.parent is None or parent is None:
        return manifest.parent is None and parent is None
    if manifest.parent.digest == parent.increment.digest:
        return True
    # A flattened full stands for the increment whose point it keeps: children of that one hold its digest.
    return (manifest.parent.point, manifest.parent.digest) == (parent.manifest.point, parent.manifest.stands_for)


def layers_of(backups: Sequence[Opened], disk: str, folder: Path) -> list[Layer]:
    """The layers of one disk, newest first, down to one that is whole."""
    return [_layer(backup, part, folder) for backup, part in parts_of(backups, disk)]


def parts_of(backups: Sequence[Opened], disk: str) -> list[tuple[Opened, DiskPart]]:
    """The backups that make up one disk, newest first, down to one that holds the whole disk."""
    found: list[tuple[Opened, DiskPart]] = []
    for backup in reversed(backups):
        part = next((part for part in backup.manifest.disks if part.id == disk), None)
        if part is None:
            raise IntegrityError(f"increment {backup.increment.id} holds nothing of disk {disk}, which later ones need")
        found.append((backup, part))
        if part.whole:
            return found
    raise IntegrityError(f"disk {disk}: the chain does not begin with the whole disk")


def _layer(backup: Opened, part: DiskPart, folder: Path) -> Layer:
    listed = {entry.name: entry for entry in backup.manifest.artifacts}[part.sums]
    return Layer(
        name=f"increment {backup.increment.id} (source {backup.increment.source}), disk {part.id}",
        open=backup.artifact(part.artifact, part.size).open,
        sums=partial(checked, backup.artifact(part.sums, listed.size), part.sums_digest, folder),
        size=part.size,
        virtual_size=part.virtual_size,
        whole=part.whole,
        tables_digest=bytes.fromhex(part.tables_digest),
        order=part.order,
    )


def checked(sums: Artifact, digest: str, folder: Path) -> BinaryIO:
    """The sums of a disk, fetched and held against their digest before any of them is believed.

    They are 0.05 % of the data: in memory up to 16 MiB (32 GiB of data), in a file without a name beyond.
    """
    local = SpooledTemporaryFile(max_size=16 << 20, dir=str(folder))  # noqa: SIM115 - the merge closes it
    with ExitStack() as on_error:
        on_error.callback(local.close)
        hasher = blake3()
        with sums.open() as file:
            while block := file.read(1 << 20):
                hasher.update(block)
                local.write(block)
        if hasher.hexdigest() != digest:
            raise IntegrityError(f"{sums.name} is not what was written", "Restore another increment.")
        local.seek(0)
        on_error.pop_all()
    return cast("BinaryIO", local)
