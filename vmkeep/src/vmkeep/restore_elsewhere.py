"""Restores that make no files: onto a block device, to a stream, or to nowhere, to see that they would go well."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from backupcore import restore as core
from backupcore.chain import lineage
from backupcore.context import Context, Progress
from backupcore.datastore import Datastore
from backupcore.errors import BackupError, Busy, ConfigError
from backupcore.model import Image
from vmkeep import lock
from vmkeep.catalog import images
from vmkeep.workplace import Workplace

__all__ = ["check", "onto", "pour"]


def check(
    place: Workplace,
    reference: str,
    *,
    number: int | None = None,
    disks: Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[Image, core.Restored]:
    """Read all that a restore of this increment reads, hold it against its digests, and write nothing."""
    with _opened(place, reference, progress) as (image, store, ctx):
        return image, core.check(store, image, number, ctx, disks=disks or None)


def onto(
    place: Workplace,
    reference: str,
    device: Path,
    *,
    number: int | None = None,
    disks: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[Image, core.Restored]:
    """Write one disk onto a block device. Busy if a VM of this host has it as a disk; see `core.onto` for the rest."""
    with _opened(place, reference, progress) as (image, store, ctx):
        disk = _only(image, number, disks)
        _require_unused(place, device)
        return image, core.onto(store, image, number, ctx, disk=disk, device=device, overwrite=overwrite)


def pour(
    place: Workplace,
    reference: str,
    out: BinaryIO,
    *,
    number: int | None = None,
    disks: Sequence[str] = (),
    form: core.Form = "qcow2",
    progress: Progress | None = None,
) -> tuple[Image, core.Restored]:
    """Write one disk to a stream."""
    with _opened(place, reference, progress) as (image, store, ctx):
        made = core.pour(store, image, number, ctx, disk=_only(image, number, disks), out=out, form=form)
        out.flush()
        return image, made


@contextmanager
def _opened(place: Workplace, reference: str, progress: Progress | None) -> Iterator[tuple[Image, Datastore, Context]]:
    image = images.find(place.catalog_if_any, reference)
    with lock.image_shared(place.state, image):
        image = images.find(place.catalog_if_any, image.uuid)  # what it was before the lock may be gone
        with place.context(progress) as ctx:
            yield image, place.datastore(image.datastore), ctx


def _only(image: Image, number: int | None, disks: Sequence[str]) -> str:
    held = [disk.id for disk in lineage(image, number)[-1].disks]
    chosen = list(disks) or held
    if len(chosen) != 1:
        raise ConfigError(f"one disk can be restored in this way, not {len(chosen)}", f"--disk: {', '.join(held)}")
    return chosen[0]


def _require_unused(place: Workplace, device: Path) -> None:
    try:
        found = place.hypervisor.vms()
    except BackupError:
        return  # a host without a hypervisor has no VM that could use it
    there = os.path.realpath(device)
    for one in found:
        for disk in one.disks:
            if os.path.realpath(disk.path) == there:
                raise Busy(f"{device} is disk {disk.id} of VM {one.vm.name}", "Choose another device, or detach it.")
