"""Restore: one increment of an image, from its datastore to qcow2 files, checked on the way."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from backupcore.chain import lineage
from backupcore.disk.merge import merge
from backupcore.disk.writer import DiskWriter
from backupcore.errors import ConfigError, NotFound
from backupcore.model import Disk, Image, Increment, SourceRef
from backupcore.opened import layers_of, open_chain

if TYPE_CHECKING:
    from backupcore.context import Context
    from backupcore.datastore import Datastore

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
    backups = open_chain(datastore, image, chain, ctx)
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
    plans = [(part, layers_of(backups, part.id, ctx.folder)) for part in wanted]
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
