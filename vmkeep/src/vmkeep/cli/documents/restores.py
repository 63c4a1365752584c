"""Documents of restores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backupcore.hypervisor import EFFECTS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

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
        "nvram": _beside(done, "nvram", done.nvram),
        "tpm": _beside(done, "tpm", done.tpm),
    }


def _beside(done: Replaced, name: str, path: Path | None) -> Document | None:
    return {"path": str(path), "kept": str(done.kept[name]) if name in done.kept else None} if path else None


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
        "left_out_effects": {
            effect.replace(" ", "_"): list(files.left_out_effects.get(effect, ())) for effect in EFFECTS
        },
        "uuid": files.vm.uuid if files.vm else None,
    }


def elsewhere(image: Image, number: int, disks: Sequence[RestoredDisk], driver: str, device: str | None) -> Document:
    """``vmkeep restore --device`` and ``--verify-only``."""
    return {
        "increment": number,
        "disks": [{**_restored(image, disk, driver), "path": device} for disk in disks],
    }
