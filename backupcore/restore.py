"""Restore: one increment of an image, from its datastore to files, a device or a stream, checked on the way."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from backupcore.assembly import Assembly, Nowhere
from backupcore.chain import lineage
from backupcore.disk.raw import DeviceWriter, RawWriter
from backupcore.disk.writer import DiskWriter
from backupcore.errors import ConfigError, NotFound, TargetFull, from_os_error
from backupcore.model import Disk, Image, Increment, SourceRef
from backupcore.opened import Opened, open_chain

if TYPE_CHECKING:
    from backupcore.context import Context
    from backupcore.datastore import Datastore
    from backupcore.manifest import DiskPart

__all__ = ["Form", "Restored", "RestoredDisk", "check", "onto", "onto_new", "pour", "restore"]

Form = Literal["qcow2", "raw"]
"""How a restored disk is written. Both are sparse."""

WRITERS: Mapping[Form, type[DiskWriter | RawWriter]] = {"qcow2": DiskWriter, "raw": RawWriter}


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
    form: Form = "qcow2",
) -> Restored:
    """Write the disks of increment `number` (None: the last) of `image` as new files of that form, where `target` says.

    Whether there is room for them is looked at first (TargetFull). `disks` limits it to some disk IDs. Everything read
    is held against the digests that were taken when the guest's disks were read. A file gets its final name when all of
    them are written and synced; an existing one is never replaced (ConfigError, found before anything is fetched).
    NotFound for an increment or a disk that is not there; IntegrityError for a chain that is missing, changed, out of
    order or another VM's.
    """
    ctx.progress.phase("look", None)
    backups, wanted = _chosen(datastore, image, number, ctx, disks)
    targets = {part.id: target(part.disk) for part in wanted}
    for path in targets.values():
        if os.path.lexists(path):
            raise ConfigError(f"{path} exists already", "Nothing is overwritten: choose another folder or name.")
    files = _files(backups[-1])
    assemblies = [Assembly(backups, part, ctx) for part in wanted]
    _require_room(assemblies, targets)
    ctx.progress.phase("restore", sum(one.to_read for one in assemblies))
    with ExitStack() as unfinished:
        written: list[tuple[Path, Path]] = []
        restored: list[RestoredDisk] = []
        done = 0
        for one in assemblies:
            path = targets[one.part.id]
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
            unfinished.callback(temporary.unlink, missing_ok=True)
            with WRITERS[form](temporary, one.part.virtual_size) as writer:
                one.into(writer, partial(_advance, ctx, done))
                writer.finish()
            done += one.to_read
            written.append((temporary, path))
            restored.append(_restored(one, path))
        publish(written)
    return Restored(increment=backups[-1].increment, disks=tuple(restored), files=files)


def check(
    datastore: Datastore, image: Image, number: int | None, ctx: Context, *, disks: Sequence[str] | None = None
) -> Restored:
    """Do all that `restore` does, and write nothing: a restore of this increment would go well now."""
    ctx.progress.phase("look", None)
    backups, wanted = _chosen(datastore, image, number, ctx, disks)
    files = _files(backups[-1])
    assemblies = [Assembly(backups, part, ctx) for part in wanted]
    ctx.progress.phase("verify", sum(one.to_read for one in assemblies))
    done = 0
    for one in assemblies:
        one.into(Nowhere(), partial(_advance, ctx, done))
        done += one.to_read
    disks_ = tuple(_restored(one, Path(os.devnull)) for one in assemblies)
    return Restored(increment=backups[-1].increment, disks=disks_, files=files)


def onto(
    datastore: Datastore,
    image: Image,
    number: int | None,
    ctx: Context,
    *,
    disk: str,
    device: Path,
    overwrite: bool = False,
) -> Restored:
    """Write one disk onto a block device (`backupcore.disk.raw.DeviceWriter`)."""
    ctx.progress.phase("look", None)
    backups, (part,) = _chosen(datastore, image, number, ctx, [disk])
    one = Assembly(backups, part, ctx)
    with DeviceWriter(device, part.virtual_size, overwrite=overwrite) as writer:
        ctx.progress.phase("restore", one.to_read)
        one.into(writer, ctx.progress.done)
        writer.finish()
    return Restored(increment=backups[-1].increment, disks=(_restored(one, device),), files={})


def onto_new(
    datastore: Datastore,
    image: Image,
    number: int | None,
    ctx: Context,
    *,
    device: Callable[[Disk], Path],
    disks: Sequence[str] | None = None,
) -> Restored:
    """Write disks onto block devices that `device` makes for them, of a disk's size or somewhat larger, raw.

    It is called once the chain is known to be there and in order. What such a device held is lost, also beyond the end
    of the disk. Whoever made the devices removes them if this raises.
    """
    ctx.progress.phase("look", None)
    backups, wanted = _chosen(datastore, image, number, ctx, disks)
    files = _files(backups[-1])
    assemblies = [Assembly(backups, part, ctx) for part in wanted]
    devices = {part.id: device(part.disk) for part in wanted}
    ctx.progress.phase("restore", sum(one.to_read for one in assemblies))
    done = 0
    for one in assemblies:
        with DeviceWriter(devices[one.part.id], one.part.virtual_size, overwrite=True, rest=True) as writer:
            one.into(writer, partial(_advance, ctx, done))
            writer.finish()
        done += one.to_read
    restored = tuple(_restored(one, devices[one.part.id]) for one in assemblies)
    return Restored(increment=backups[-1].increment, disks=restored, files=files)


def pour(
    datastore: Datastore,
    image: Image,
    number: int | None,
    ctx: Context,
    *,
    disk: str,
    out: BinaryIO,
    form: Form = "qcow2",
) -> Restored:
    """Write one disk to a stream, first byte to last.

    A long chain whose layers can only be read forward is put together in the context's folder first, sparse; whether
    there is room is looked at before. Damage that is met on the way raises, when a part is written already.
    """
    ctx.progress.phase("look", None)
    backups, (part,) = _chosen(datastore, image, number, ctx, [disk])
    one = Assembly(backups, part, ctx)
    if one.in_guest_order:
        ctx.progress.phase("restore", part.virtual_size if form == "raw" else one.size)
        count = 0

        def advance(more: int) -> None:
            nonlocal count
            count += more
            ctx.progress.done(count)

        (one.stream_raw if form == "raw" else one.stream_qcow2)(out, advance)
        return Restored(increment=backups[-1].increment, disks=(_restored(one, Path("-")),), files={})
    staged = ctx.folder / "staged"
    ctx.log.warning("a chain of %d increments is put together in %s first", len(one.layers), staged.parent)
    _require_room([one], {part.id: staged})
    ctx.progress.phase("restore", one.to_read)
    with WRITERS[form](staged, part.virtual_size) as writer:
        one.into(writer, ctx.progress.done)
        writer.finish()
    with staged.open("rb") as file:
        while block := file.read(1 << 20):
            ctx.check()
            out.write(block)
    return Restored(increment=backups[-1].increment, disks=(_restored(one, Path("-")),), files={})


def _chosen(
    datastore: Datastore, image: Image, number: int | None, ctx: Context, disks: Sequence[str] | None
) -> tuple[list[Opened], list[DiskPart]]:
    """The chain of an increment, opened, and the disks that are wanted of it."""
    backups = open_chain(datastore, image, lineage(image, number), ctx)
    newest = backups[-1].manifest
    wanted = [part for part in newest.disks if disks is None or part.id in disks]
    unknown = set(disks or ()) - {part.id for part in wanted}
    if unknown:
        held = ", ".join(part.id for part in newest.disks)
        raise NotFound(f"increment {newest.number} holds no disk {', '.join(sorted(unknown))}", f"It holds: {held}.")
    return backups, wanted


def _files(newest: Opened) -> dict[str, bytes]:
    """The small artifacts, each held against its digest."""
    return {
        part.name: newest.small(part.name, part.size, part.digest)
        for part in newest.manifest.artifacts
        if not part.name.startswith("sums.")
    }


def _restored(one: Assembly, path: Path) -> RestoredDisk:
    part = one.part
    return RestoredDisk(
        id=part.id, path=path, virtual_size=part.virtual_size, layers=one.layers, artifact=part.artifact
    )


def _require_room(assemblies: Sequence[Assembly], targets: Mapping[str, Path]) -> None:
    """TargetFull if the disks do not fit where they are to go. Their exact size is found out only if it matters."""
    by_device: dict[int, list[Assembly]] = {}
    folders: dict[int, Path] = {}
    for one in assemblies:
        folder = targets[one.part.id].parent
        try:
            device = folder.stat().st_dev
        except OSError as error:
            raise from_os_error(error, f"the folder {folder}") from error
        by_device.setdefault(device, []).append(one)
        folders[device] = folder
    for device, these in by_device.items():
        room = os.statvfs(folders[device])
        free = room.f_bavail * room.f_frsize
        if sum(one.most for one in these) <= free:
            continue
        needed = sum(one.size for one in these)
        if needed > free:
            raise TargetFull(
                f"the disks need {needed} bytes in {folders[device]}, {free} are free",
                "Make room there, or restore elsewhere, or one disk at a time.",
            )


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
