"""Restore: one increment of an image, from its datastore to qcow2 files, checked on the way."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING, BinaryIO, cast

from blake3 import blake3

from backupcore import manifest as manifests
from backupcore.chain import lineage
from backupcore.disk.merge import Layer, merge
from backupcore.disk.writer import DiskWriter
from backupcore.errors import ConfigError, IntegrityError, NotFound
from backupcore.model import Artifact, Disk, Image, Increment, SourceRef

if TYPE_CHECKING:
    from backupcore.context import Context
    from backupcore.datastore import Datastore
    from backupcore.manifest import DiskPart, Manifest

__all__ = ["Restored", "RestoredDisk", "restore"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredDisk:
    """One restored disk: its file, its virtual size in bytes, and what it was put together from, oldest first."""

    id: str
    path: Path
    virtual_size: int
    layers: tuple[tuple[int, SourceRef], ...]
    artifact: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What a restore made. `files` are the small artifacts: ``vm.xml``, ``nvram`` where there is one."""

    increment: Increment
    disks: tuple[RestoredDisk, ...]
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class _Backup:
    """One increment as its datastore holds it, with its manifest checked."""

    increment: Increment
    manifest: Manifest
    artifacts: Mapping[str, Artifact]

    def artifact(self, name: str, size: int) -> Artifact:
        found = self.artifacts.get(name)
        if found is None or found.size != size:
            state = "is missing" if found is None else f"has {found.size} bytes instead of {size}"
            raise IntegrityError(
                f"increment {self.increment.id} (source {self.increment.source}): {name} {state}",
                "Restore another increment; a new image starts with: vmkeep backup --reset",
            )
        return found

    def small(self, name: str, size: int, digest: str) -> bytes:
        with self.artifact(name, size).open() as file:
            data = file.read()
        if blake3(data).hexdigest() != digest:
            raise IntegrityError(f"increment {self.increment.id} (source {self.increment.source}): {name} was changed")
        return data


def restore(
    datastore: Datastore,
    image: Image,
    number: int | None,
    ctx: Context,
    *,
    target: Callable[[Disk], Path],
    disks: Sequence[str] | None = None,
) -> Restored:
    """Write the disks of increment `number` (None: the last) of `image` as new qcow2 files, where `target` says.

    `disks` limits it to some disk IDs. Everything read is held against the digests that were taken when the guest's
    disks were read. A file gets its final name when all of them are written and synced; an existing one is never
    replaced (ConfigError, found before anything is fetched). NotFound for an increment or a disk that is not there;
    IntegrityError for a chain that is missing, changed, out of order or another VM's.
    """
    chain = lineage(image, number)
    ctx.progress.phase("look", None)
    backups = _open_chain(datastore, image, chain, ctx)
    newest = backups[-1].manifest
    wanted = [part for part in newest.disks if disks is None or part.id in disks]
    unknown = set(disks or ()) - {part.id for part in wanted}
    if unknown:
        held = ", ".join(part.id for part in newest.disks)
        raise NotFound(f"increment {newest.number} holds no disk {', '.join(sorted(unknown))}", f"It holds: {held}.")
    targets = {part.id: target(part.disk) for part in wanted}
    for path in targets.values():
        if os.path.lexists(path):
            raise ConfigError(f"{path} exists already", "Nothing is overwritten: choose another folder or name.")
    files = {
        part.name: backups[-1].small(part.name, part.size, part.digest)
        for part in newest.artifacts
        if not part.name.startswith("sums.")
    }
    plans = [(part, _layers(backups, part.id, ctx.folder)) for part in wanted]
    ctx.progress.phase("restore", sum(layer.size for _, layers in plans for layer in layers))
    with ExitStack() as unfinished:
        written: list[tuple[Path, Path]] = []
        restored: list[RestoredDisk] = []
        done = 0
        for part, layers in plans:
            path = targets[part.id]
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
            unfinished.callback(temporary.unlink, missing_ok=True)
            with DiskWriter(temporary, part.virtual_size) as writer:
                merge(layers, writer, progress=partial(_advance, ctx, done), check=ctx.check)
                writer.finish()
            done += sum(layer.size for layer in layers)
            written.append((temporary, path))
            restored.append(
                RestoredDisk(
                    id=part.id,
                    path=path,
                    virtual_size=part.virtual_size,
                    layers=tuple((backup.increment.id, backup.increment.source) for backup in backups[-len(layers) :]),
                    artifact=part.artifact,
                )
            )
        publish(written)
    return Restored(increment=chain[-1], disks=tuple(restored), files=files)


def publish(files: Sequence[tuple[Path, Path]]) -> None:
    """Give each written file its final name, replacing nothing: all of them, or none.

    ConfigError if a name was taken meanwhile.
    """
    done: list[Path] = []
    try:
        for written, path in files:
            try:
                os.link(written, path)  # unlike rename, it fails where the name exists
            except FileExistsError:
                raise ConfigError(f"{path} exists already", "Nothing is overwritten: choose another name.") from None
            except OSError:
                # FAT, CIFS and some FUSE file systems know no hard links; there a look before the rename must do.
                if os.path.lexists(path):
                    raise ConfigError(f"{path} exists already", "Nothing is overwritten.") from None
                written.rename(path)
            done.append(path)
        for folder in {path.parent for _, path in files}:
            _sync_folder(folder)
    except BaseException:
        for path in done:
            path.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _advance(ctx: Context, before: int, count: int) -> None:
    ctx.progress.done(before + count)


def _open_chain(datastore: Datastore, image: Image, chain: Sequence[Increment], ctx: Context) -> list[_Backup]:
    """Every increment of the chain, oldest first, its manifest held against the catalog, the VM and its parent."""
    backups: list[_Backup] = []
    for increment in chain:
        ctx.check()
        what = f"increment {increment.id} (source {increment.source})"
        artifacts = datastore.artifacts(increment.source, ctx)
        if manifests.NAME not in artifacts:
            raise IntegrityError(f"{what}: it has no manifest, so it is not complete")
        if artifacts[manifests.NAME].size > manifests.LIMIT:
            raise IntegrityError(f"{what}: the manifest is larger than {manifests.LIMIT >> 20} MiB")
        with artifacts[manifests.NAME].open() as file:
            data = file.read()
        manifest = manifests.parse(data, what)
        if manifest.vm.uuid != image.vm.uuid:
            raise IntegrityError(f"{what}: it is a backup of another VM ({manifest.vm.name}, {manifest.vm.uuid})")
        if blake3(data).hexdigest() != increment.digest or manifest.point != increment.point:
            raise IntegrityError(f"{what}: it is not the backup that was recorded under this number")
        parent = backups[-1] if backups else None
        if (manifest.parent.digest if manifest.parent else None) != (parent.increment.digest if parent else None):
            raise IntegrityError(f"{what}: it does not build on increment {parent.increment.id if parent else 'none'}")
        backups.append(_Backup(increment, manifest, artifacts))
    return backups


def _layers(backups: Sequence[_Backup], disk: str, folder: Path) -> list[Layer]:
    """The layers of one disk, newest first, down to one that is whole."""
    layers: list[Layer] = []
    for backup in reversed(backups):
        part = next((part for part in backup.manifest.disks if part.id == disk), None)
        if part is None:
            raise IntegrityError(f"increment {backup.increment.id} holds nothing of disk {disk}, which later ones need")
        layers.append(_layer(backup, part, folder))
        if part.whole:
            return layers
    raise IntegrityError(f"disk {disk}: the chain does not begin with the whole disk")


def _layer(backup: _Backup, part: DiskPart, folder: Path) -> Layer:
    listed = {entry.name: entry for entry in backup.manifest.artifacts}[part.sums]
    return Layer(
        name=f"increment {backup.increment.id} (source {backup.increment.source}), disk {part.id}",
        open=backup.artifact(part.artifact, part.size).open,
        sums=partial(_checked, backup.artifact(part.sums, listed.size), part.sums_digest, folder),
        size=part.size,
        virtual_size=part.virtual_size,
        whole=part.whole,
        tables_digest=bytes.fromhex(part.tables_digest),
    )


def _checked(sums: Artifact, digest: str, folder: Path) -> BinaryIO:
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
