"""The disks of a VM that is off, by QEMU's own programs: what they hold, and their bitmaps."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from backupcore.errors import BackupError, Busy, HypervisorError, NotFound, UnsupportedOperation, from_os_error
from backupcore.typed import typed
from backupcore_libvirt.disks import Bitmap, Node, SourceDisk
from backupcore_libvirt.qemu_nbd import image_options, is_locked

__all__ = ["add_bitmaps", "check_backing", "remove_bitmap", "stopped_nodes"]

LOCK_LIMIT = 5.0
"""Seconds to wait for a lock: a QEMU that ends holds its own for a moment."""


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


def check_backing(vm: str, disks: Sequence[SourceDisk]) -> None:
    """That every file below the top of these disks is a local one of a recorded format. UnsupportedOperation.

    QEMU would guess it from the contents, and a guest that once wrote to that file as to a raw disk could have made it
    look like an image which has a file of the host below. Nor may an image keep its data in another file: it could be
    one that is closed to the VM's own QEMU, and we may be root.
    """
    for disk in disks:
        image, info = disk, _info(disk)
        while True:
            if "data-file" in info.get("format-specific", {}).get("data", {}):
                raise UnsupportedOperation(
                    f"VM {vm} is off, and {image.path} (disk {disk.id}) keeps its data in another file: not read"
                )
            if "backing-filename" not in info:
                break
            below = str(info.get("full-backing-filename", info["backing-filename"]))
            shape = info.get("backing-filename-format")
            if shape not in ("qcow2", "raw"):
                raise UnsupportedOperation(
                    f"VM {vm}: disk {disk.id}: {image.path} does not say which format its backing file {below} has",
                    f"Start it first, or, as it is off: {typed('qemu-img rebase -u -F FORMAT -b', below, image.path)}",
                )
            if not below.startswith("/"):
                raise UnsupportedOperation(
                    f"VM {vm} is off, and the backing file of disk {disk.id} is no local file ({below})",
                    "Start the VM: it can be backed up while it runs.",
                )
            image = replace(image, path=below, format=shape)
            info = _info(image)


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
    deadline = time.monotonic() + LOCK_LIMIT
    while True:
        try:
            call = ["qemu-img", command, *options, "--image-opts", image_options(disk.path, disk.format), *more]
            # In a session of its own: a Ctrl-C on our terminal must not end it in the middle of a change.
            done = subprocess.run(
                call, capture_output=True, text=True, errors="replace", check=False, start_new_session=True
            )
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
