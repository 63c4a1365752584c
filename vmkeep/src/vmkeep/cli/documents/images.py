"""Documents of images, and of what is done to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmkeep.cli.documents import parts
from vmkeep.cli.figures import iso

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from backupcore.model import Image
    from vmkeep.catalog.holds import Hold
    from vmkeep.catalog.images import Listed
    from vmkeep.cli.documents.parts import Document
    from vmkeep.flatten import Done
    from vmkeep.retention import Plan
    from vmkeep.verify import Result

__all__ = ["flatten", "image", "images", "prune", "verify"]


def prune(plans: list[Plan], warnings: list[str], *, dry_run: bool) -> Document:
    """``vmkeep image prune``."""
    return {
        "dry_run": dry_run,
        "plans": [
            {
                "vm": one.vm.name,
                "uuid": one.vm.uuid,
                "datastore": one.datastore,
                "unknown": one.unknown or None,
                "actions": [parts.action(action) for action in one.actions],
            }
            for one in plans
        ],
        "warnings": warnings,
    }


def flatten(done: Done) -> Document:
    """``vmkeep image flatten``."""
    return {
        "id": done.image.number,
        "image_uuid": done.image.uuid,
        "increment": done.full.id,
        "point": done.full.point,
        "source": done.full.source.token,
        "merged": [one.id for one in done.merged],
        "size": done.full.size,
        "stored": done.stored,
        "copied": done.copied,
        "seconds": round(done.seconds, 3),
        "warnings": list(done.warnings),
    }


def _image(found: Image, date: datetime | None, size: int, held: Hold | None) -> Document:
    return {
        "id": found.number,
        "image_uuid": found.uuid,
        "name": f"{found.vm.name} {iso(date) or ''}".strip(),
        "vm": found.vm.name,
        "uuid": found.vm.uuid,
        "datastore": found.datastore,
        "state": found.state,
        "date": iso(date),
        "size": size,
        "pinned": found.pinned,
        "host": found.host or None,
        "installation": found.installation or None,
        "held": {"kind": held.kind, "until": iso(held.until), "noted": iso(held.noted)} if held else None,
    }


def image(found: Image, held: Hold | None = None, lost: Mapping[int, str] | None = None) -> Document:
    """``vmkeep image show``."""
    date = found.increments[0].date if found.increments else None
    return {
        **_image(found, date, sum(increment.size for increment in found.increments), held),
        "increments": [
            {
                "id": increment.id,
                "pid": increment.pid,
                "type": increment.type.letter,
                "point": increment.point,
                "size": increment.size,
                "date": iso(increment.date),
                "source": increment.source.token,
                "consistency": increment.consistency,
                "reason": increment.reason,
                "disks": parts.disks(increment),
                "lost": (lost or {}).get(increment.id),
            }
            for increment in found.increments
        ],
    }


def images(found: list[Listed], held: Mapping[int, Hold]) -> list[Document]:
    """``vmkeep image list``; `held` by number."""
    return [_image(one.image, one.first, one.size, held.get(one.image.number)) for one in found]


def verify(result: Result) -> Document:
    """``vmkeep image verify``."""
    return {
        "id": result.image.number,
        "image_uuid": result.image.uuid,
        "state": result.image.state,
        "ok": result.ok,
        "superseded": result.superseded,
        "sample": result.sample,
        "increments": [
            {"id": one.increment.id, "source": one.increment.source.token, "read": one.read, "problem": one.problem}
            for one in result.increments
        ],
    }
