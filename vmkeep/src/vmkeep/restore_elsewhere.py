"""Restores that make no files: onto a block device, to a stream, or to nowhere, to see that they would go well."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from backupcore import restore as core
from backupcore.chain import lineage
from backupcore.context import Context, Progress
from backupcore.datastore import Datastore
from backupcore.errors import BackupError, Busy, ConfigError, UnsupportedOperation, from_os_error
from backupcore.hypervisor import VMDisk, VMState
from backupcore.model import Image
from backupcore.typed import typed
from vmkeep import lock, standing
from vmkeep.catalog import images, places
from vmkeep.workplace import Workplace

__all__ = ["check", "onto", "pour"]

log = logging.getLogger("vmkeep.restore")


def check(
    place: Workplace,
    reference: str,
    *,
    number: int | None = None,
    disks: Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[Image, core.Restored]:
    """Read all that a restore of this increment reads, hold it against its digests, and write nothing."""
    with _opened(place, reference, number, progress) as (image, store, ctx):
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
    """Write one disk onto a block device; see `core.onto`.

    Where it is a raw disk of a VM of this host, that VM must be powered off and stay so, and `overwrite` be said: Busy.
    """
    with _opened(place, reference, number, progress) as (image, store, ctx):
        disk = _only(image, number, disks)
        with _unused(place, device, overwrite=overwrite):
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
    with _opened(place, reference, number, progress) as (image, store, ctx):
        try:
            made = core.pour(store, image, number, ctx, disk=_only(image, number, disks), out=out, form=form)
            out.flush()
        except OSError as error:
            raise from_os_error(error, "the standard output") from error
        return image, made


@contextmanager
def _opened(
    place: Workplace, reference: str, number: int | None, progress: Progress | None
) -> Iterator[tuple[Image, Datastore, Context]]:
    image = images.find(place.catalog_if_any, reference)
    with lock.image_read(place.state, image):
        image = images.find(place.catalog_if_any, image.uuid)  # what it was before the lock may be gone
        places.require_here(image, place.config.datastores)
        with place.context(progress) as ctx:
            store = place.datastore(image.datastore)
            with place.same_place(image.datastore).blamed(ctx):
                yield standing.current(place, store, image, ctx, number=number), store, ctx


def _only(image: Image, number: int | None, disks: Sequence[str]) -> str:
    held = [disk.id for disk in lineage(image, number)[-1].disks]
    chosen = list(disks) or held
    if len(chosen) != 1:
        raise ConfigError(f"one disk can be restored in this way, not {len(chosen)}", f"--disk: {', '.join(held)}")
    return chosen[0]


@contextmanager
def _unused(place: Workplace, device: Path, *, overwrite: bool) -> Iterator[None]:
    """With the device, which no VM uses: looked at before, and again at the end.

    Nothing keeps a VM from starting meanwhile: libvirt gives each one device nodes of its own, so QEMU's locks on them
    do not meet ours.
    """
    for one in _vms(place):
        _refuse(one, device, overwrite=overwrite)
    yield
    for one in _vms(place):
        if _disks_at(one, device) and one.state != "off":
            raise Busy(
                f"VM {one.vm.name} was started while its disk {device} was written: what it sees there is torn",
                "Power it off and run this again.",
            )


def _vms(place: Workplace) -> Sequence[VMState]:
    try:
        return place.hypervisor.vms()
    except ConfigError:
        return ()  # its plugin is not installed: this host has no VM that could use the device
    except BackupError as error:
        # VMs outlive a libvirtd that is down; a host that is set up anew may have none yet.
        # A VM that runs is noticed all the same: its QEMU has the device open.
        log.warning("which VM the device belongs to was not looked at: %s", error)
        return ()


def _disks_at(one: VMState, device: Path) -> list[VMDisk]:
    there = os.path.realpath(device)
    return [disk for disk in one.disks if there in map(os.path.realpath, filter(None, (disk.path, disk.lies_on)))]


def _refuse(one: VMState, device: Path, *, overwrite: bool) -> None:
    for disk in _disks_at(one, device):
        what = f"{device} is disk {disk.id} of VM {one.vm.name}"
        if one.state != "off":
            raise Busy(f"{what}, which is {one.state_in_full}", "Power it off, or choose another device.")
        if disk.lies_on:
            raise Busy(
                f"{what}, which writes to an overlay on it: {disk.path}",
                f"Let it have its plain disk first: vmkeep recover {shlex.quote(one.vm.name)}. Or choose another "
                "device.",
            )
        if disk.format != "raw":
            raise UnsupportedOperation(
                f"{what}, whose format is {disk.format}; --device writes raw disks",
                "Restore it with --to, then write it there: "
                f"{typed(f'qemu-img convert -O {disk.format} FILE', device)}",
            )
        if not overwrite:
            raise Busy(what, "To give up what it holds now: --overwrite. Or choose another device.")
