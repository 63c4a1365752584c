"""Documents of restores."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from backupcore.model import Image
    from backupcore.restore import RestoredDisk
    from vmkeep.cli.documents.parts import Document
    from vmkeep.in_place import Replaced
    from vmkeep.restore import Files

__all__ = ["elsewhere", "replaced", "restore"]


def _restored(image: Image, disk: RestoredDisk, driver: str) -> Document:
    layers = ",".join(f"{number}:{source}" for number, source in disk.layers)
    return {
        "id": disk.id,
        "path": str(disk.path),
        "size": disk.virtual_size,
        "from": f"{driver}://{image.datastore}/{layers}//{disk.artifact}",
    }


def replaced(done: Replaced, driver: str) -> Document:
    """``vmkeep restore --in-place``."""
    return {
        "vm": done.vm.name,
        "uuid": done.vm.uuid,
        "image": done.image.number,
        "increment": done.number,
        "disks": [
            {**_restored(done.image, disk, driver), "kept": str(done.kept[disk.id]) if disk.id in done.kept else None}
            for disk in done.disks
        ],
        "nvram": {"path": str(done.nvram), "kept": str(done.kept["nvram"]) if "nvram" in done.kept else None}
        if done.nvram
        else None,
    }


def restore(files: Files, driver: str) -> Document:
    """``vmkeep restore``; `driver` is the name of the datastore's driver."""
    return {
        "name": files.name,
        "xml": str(files.definition) if files.definition else None,
        "nvram": str(files.nvram) if files.nvram else None,
        "beside": [{"artifact": name, "path": str(path)} for name, path in files.beside.items()],
        "increment": files.number,
        "pool": files.pool,
        "disks": [_restored(files.image, disk, driver) for disk in files.disks],
        "left_out": list(files.left_out),
        "uuid": files.vm.uuid if files.vm else None,
    }


def elsewhere(image: Image, number: int, disks: Sequence[RestoredDisk], driver: str, device: str | None) -> Document:
    """``vmkeep restore --device`` and ``--verify-only``."""
    return {
        "increment": number,
        "disks": [{**_restored(image, disk, driver), "path": device} for disk in disks],
    }
