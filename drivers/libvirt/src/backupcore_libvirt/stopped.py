"""The disks of a VM that is off, by QEMU's own programs: what they hold, and their bitmaps."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from backupcore.errors import BackupError, Busy, HypervisorError, NotFound, UnsupportedOperation, from_os_error
from backupcore.typed import typed
from backupcore_libvirt.backing import backing_of
from backupcore_libvirt.disks import Bitmap, Node, SourceDisk
from backupcore_libvirt.image_size import strange_kind
from backupcore_libvirt.qcow2_header import header_of
from backupcore_libvirt.qemu_nbd import image_options, is_locked
from backupcore_libvirt.reading.still import require_unwritten
from backupcore_libvirt.scratch import Owner
from backupcore_libvirt.source import PLAIN

__all__ = ["add_bitmaps", "check_files", "merge_bitmap", "remove_bitmap", "stopped_nodes"]

LOCK_LIMIT = 5.0
"""Seconds to wait for a lock: a QEMU that ends holds its own for a moment."""

_INFO_LIMIT = 60.0  # seconds; a read of what only looks like a file (in /proc, say) may never end


def stopped_nodes(vm: str, disks: Sequence[SourceDisk]) -> dict[str, Node]:
    """What the images of these disks hold, by disk ID; the nodes have no name.

    Busy where one is open in another process; NotFound, AccessDenied, HypervisorError where one cannot be read.
    """
    found = {}
    for disk in disks:
        if not disk.path.startswith("/"):
            raise UnsupportedOperation(
                f"VM {vm} is off, and the file of disk {disk.id} ({disk.kind} {disk.path}) is not known",
                "Start the VM: then libvirt tells it.",
            )
        _check_header(vm, disk.id, disk)
        info = _info(disk)
        special: dict[str, Any] = info.get("format-specific", {}).get("data", {})
        found[disk.id] = Node(
            name="",
            virtual_size=int(info["virtual-size"]),
            compat=str(special.get("compat", "")) if disk.format == "qcow2" else "",
            bitmaps=tuple(
                Bitmap(str(bitmap["name"]), "auto" in bitmap["flags"], "in-use" in bitmap["flags"])
                for bitmap in special.get("bitmaps", ())
            ),
            snapshots=tuple(str(snapshot["name"]) for snapshot in info.get("snapshots", ())),
        )
    return found


def check_files(vm: str, disks: Sequence[SourceDisk], owner: Callable[[], Owner]) -> None:
    """That these disks consist of local files of recorded formats, all of which are known. UnsupportedOperation.

    Of a running VM QEMU knows what it has open. Here it is we who open, and may be root: QEMU would guess a format that
    no header tells, from what a guest may have written, and a header may name any file of the host. `owner` is asked
    for the user that QEMU runs as, if it has to be known.
    """
    folders = {Path(os.path.realpath(disk.path)).parent for disk in disks}
    files: dict[tuple[int, int], SourceDisk] = {}
    for disk in disks:
        other = files.setdefault(_identity(disk), disk)
        if other is not disk and not (other.source.part and disk.source.part):
            raise UnsupportedOperation(
                f"VM {vm}: disks {other.id} and {disk.id} are one file ({disk.path})",
                f"Give each a file of its own: {typed('virsh edit', vm)}",
            )
        if disk.source.unknown:
            raise UnsupportedOperation(
                f"VM {vm} is off, and the definition says of disk {disk.id} what only its QEMU can follow "
                f"({', '.join(disk.source.unknown)})",
                "Start the VM: it can be backed up while it runs.",
            )
        below = _files_below(vm, disk, folders, owner)
        _check_unwritten(vm, (disk.path, *below))
        if disk.source.contradicts(below):
            raise UnsupportedOperation(
                f"VM {vm} is off, and its definition puts other files below disk {disk.id} ({disk.path}) than the "
                f"image itself does: {', '.join(disk.source.below) or 'none'} instead of {', '.join(below) or 'none'}",
                f"Start the VM; or remove <backingStore> if the image is right: {typed('virsh edit', vm)}",
            )


def _check_unwritten(vm: str, files: Sequence[str]) -> None:
    """That nobody has a block device open for writing; its own QEMU, as it ends, has it open for a moment."""
    deadline = time.monotonic() + LOCK_LIMIT
    while True:
        try:
            require_unwritten(vm, files)
        except Busy:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def _identity(disk: SourceDisk) -> tuple[int, int]:
    try:
        found = Path(disk.path).stat()
    except OSError as error:
        raise from_os_error(error, f"disk {disk.id}") from error
    # Of devices there may be several names, each with an inode of its own.
    return (-1, found.st_rdev) if stat.S_ISBLK(found.st_mode) else (found.st_dev, found.st_ino)


def _files_below(vm: str, disk: SourceDisk, folders: Collection[Path], owner: Callable[[], Owner]) -> list[str]:
    image, info = disk, _info(disk)
    found: list[str] = []
    seen = {os.path.realpath(disk.path)}
    while True:
        _check_data_file(vm, disk.id, image, info, owner)
        below = backing_of(info)
        if below is None:
            return found
        if below.shape not in ("qcow2", "raw"):
            raise UnsupportedOperation(
                f"VM {vm}: disk {disk.id}: {image.path} does not say which format its backing file {below.path} has",
                f"Start it first, or, as it is off: {typed('qemu-img rebase -u -F FORMAT -b', below.path, image.path)}",
            )
        if not below.path.startswith("/"):
            raise UnsupportedOperation(
                f"VM {vm} is off, and the backing file of disk {disk.id} is no local file ({below.path})",
                "Start the VM: it can be backed up while it runs.",
            )
        if os.path.realpath(below.path) in seen:
            raise UnsupportedOperation(
                f"VM {vm}: the backing files of disk {disk.id} lead back to {below.path}: no VM can start with it",
                f"Put that of {image.path} right: {typed('qemu-img rebase -u', image.path)} -b FILE -F FORMAT",
            )
        seen.add(os.path.realpath(below.path))
        _check_backing_file(vm, disk, below.path, folders, owner)
        found.append(below.path)
        image = replace(image, path=below.path, format=below.shape, source=PLAIN)
        _check_header(vm, disk.id, image)
        info = _info(image)


def _check_backing_file(
    vm: str, disk: SourceDisk, path: str, folders: Collection[Path], owner: Callable[[], Owner]
) -> None:
    """That a file which only an image's header names is one that belongs to VMs: the definition names it as well, or it
    lies in one of `folders`, those of the VM's disks, or QEMU may read it. Modes alone do not tell: libvirt gives
    images, and what is below them, to QEMU's user when the VM starts.
    """
    real = Path(os.path.realpath(path))
    if str(real) in {os.path.realpath(told) for told in disk.source.below if told}:
        return
    # Of devices the folder says nothing: all of the host's lie there.
    if real.is_file() and real.parent in folders:
        return
    if real.exists() and not owner().may("r", real):
        raise UnsupportedOperation(
            f"VM {vm} is off, and the backing file of disk {disk.id} ({path}) lies in none of the folders of its "
            f"disks, and QEMU, running as {owner()}, cannot read it",
            f"If it is the right one, name it in <backingStore> ({typed('virsh edit', vm)}), let QEMU's user read it, "
            "or start the VM.",
        )


def _check_header(vm: str, disk: str, image: SourceDisk) -> None:
    """That an image has no features but those that are known here, whatever the QEMU of this host can read."""
    if image.format != "qcow2":
        return
    try:
        header = header_of(image.path, image.source.part.offset if image.source.part else 0)
    except OSError:
        return  # whoever reads it next says so
    if header is None or not header.strange:
        return
    if header.damaged:
        hint = f"Look at it, then repair it: {typed('qemu-img check -r all -f qcow2', image.path)}"
    else:
        hint = "Start the VM: it can be backed up while it runs, where its QEMU knows the image."
    raise UnsupportedOperation(f"VM {vm} is off, and {image.path} (disk {disk}) {header.strange}", hint)


def _check_data_file(
    vm: str, disk: str, image: SourceDisk, info: Mapping[str, Any], owner: Callable[[], Owner]
) -> None:
    """That the file in which an image keeps its data is one that the VM's own QEMU may read, by its definition or by
    the file's mode.
    """
    name = str(info.get("format-specific", {}).get("data", {}).get("data-file", ""))
    told = image.source.data_file
    if not name and not told:
        return
    what = f"VM {vm} is off, and {image.path} (disk {disk}) keeps its data in another file"
    if told and told != name:
        raise UnsupportedOperation(
            f"{what}: {told} by the definition, {name or 'none'} by the image",
            "Start the VM, or put one of them right.",
        )
    if not name.startswith("/"):
        # QEMU looks for it in the folder that it was started in.
        raise UnsupportedOperation(f"{what}, which is not named by a whole path ({name})", "Start the VM.")
    if not told and not owner().may("r", Path(name)):
        raise UnsupportedOperation(
            f"{what} ({name}), which QEMU, running as {owner()}, cannot read",
            "Start the VM, or give that file to QEMU's user if it is the right one.",
        )


def add_bitmaps(disks: Sequence[SourceDisk], name: str) -> None:
    """Begin to track changes under `name` on all of these disks, or on none of them."""
    added: list[SourceDisk] = []
    try:
        for disk in disks:
            _qemu_img("bitmap", "--add", disk=disk, more=[name])
            added.append(disk)
    except BackupError:
        for disk in added:
            with suppress(BackupError):  # what it raises hides the cause, and postbackup tries again
                remove_bitmap(disk, name)
        raise


def merge_bitmap(disk: SourceDisk, name: str, source: Path, bitmap: str) -> None:
    """Make a disabled bitmap `name` with the bits that `bitmap` has in the qcow2 image `source`, of the same size."""
    bits = ["--merge", bitmap, "-b", str(source), "-F", "qcow2"]
    _qemu_img("bitmap", "--add", "--disable", *bits, disk=disk, more=[name])


def remove_bitmap(disk: SourceDisk, name: str) -> None:
    """Remove a bitmap; one that is not there, or whose image has gone, is no error."""
    try:
        _qemu_img("bitmap", "--remove", disk=disk, more=[name])
    except NotFound:
        return
    except HypervisorError as error:
        if "is not found" not in error.message:
            raise


def _info(disk: SourceDisk) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_qemu_img("info", "--output=json", disk=disk))
    return found


def _qemu_img(command: str, *options: str, disk: SourceDisk, more: Sequence[str] = ()) -> str:
    what = f"disk {disk.id} ({disk.path}): qemu-img {command}"
    if kind := strange_kind(disk.path):
        raise UnsupportedOperation(f"disk {disk.id}: {disk.path} is {kind}", "Give the VM a file or a block device.")
    deadline = time.monotonic() + LOCK_LIMIT
    while True:
        try:
            call = [
                "qemu-img",
                command,
                *options,
                "--image-opts",
                image_options(disk.path, disk.format, disk.source.part),
                *more,
            ]
            # In a session of its own: a Ctrl-C on our terminal must not end it in the middle of a change.
            done = subprocess.run(
                call,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                start_new_session=True,
                timeout=_INFO_LIMIT if command == "info" else None,
            )
        except subprocess.TimeoutExpired as error:
            raise HypervisorError(
                f"{what}: no answer within {_INFO_LIMIT:g} seconds",
                "Can the file be read? Does the file system that it lies on answer?",
            ) from error
        except OSError as error:
            if error.filename == "qemu-img":
                raise HypervisorError("qemu-img is not installed", "Debian, Ubuntu: qemu-utils.") from error
            if isinstance(error, FileNotFoundError):
                raise NotFound(f"{what}: the file is missing") from error
            raise from_os_error(error, what) from error
        if done.returncode == 0:
            return done.stdout
        said = " ".join(line.removeprefix("qemu-img: ") for line in done.stderr.strip().splitlines())
        if not is_locked(said):
            raise HypervisorError(f"{what}: {said}")
        if time.monotonic() > deadline:
            raise Busy(
                f"disk {disk.id}: {disk.path} is open in another process",
                "Has the VM just been started, or does another program use the image? Run it again.",
            )
        time.sleep(0.1)
