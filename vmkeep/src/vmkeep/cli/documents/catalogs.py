"""Documents of the catalog."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmkeep.cli.figures import iso

if TYPE_CHECKING:
    from collections.abc import Sequence

    from backupcore.model import Image
    from vmkeep.cli.documents.parts import Document
    from vmkeep.rebuild import Checked, Rebuilt

__all__ = ["checked", "rebuild", "taken_over"]


def rebuild(done: Rebuilt) -> Document:
    """``vmkeep catalog rebuild``."""
    return {
        "datastore": done.datastore,
        "added": [
            {
                "id": one.number or None,
                "image_uuid": one.uuid,
                "vm": one.vm.name,
                "uuid": one.vm.uuid,
                "host": one.host,
                "installation": one.installation or None,
                "increments": [increment.id for increment in one.increments],
                "date": iso(one.increments[-1].date),
            }
            for one in done.added
        ],
        "changed": [
            {
                "id": one.before.number,
                "image_uuid": one.before.uuid,
                "vm": one.before.vm.name,
                "uuid": one.before.vm.uuid,
                "added": list(one.added),
                "merged": list(one.merged),
                "into": one.into,
                "moved": list(one.moved),
                "lost": list(one.lost),
                "back": list(one.back),
                "increments": [increment.id for increment in one.after.increments],
            }
            for one in done.changed
        ],
        "dry_run": done.dry_run,
        "kept": str(done.kept) if done.kept else None,
        "known": done.known,
        "remarks": [{"source": one.source.token, "kind": one.kind, "why": one.why} for one in done.remarks],
        "busy": list(done.busy),
    }


def taken_over(datastore: str, taken: Sequence[Image], installation: str) -> Document:
    """``vmkeep catalog take-over``."""
    return {
        "datastore": datastore,
        "installation": installation,
        "images": [
            {
                "id": one.number,
                "image_uuid": one.uuid,
                "vm": one.vm.name,
                "uuid": one.vm.uuid,
                "host": one.host,
                "from": one.installation or None,
            }
            for one in taken
        ],
    }


def checked(found: Checked) -> Document:
    """``vmkeep catalog check``."""
    return {
        "datastores": list(found.datastores),
        "missing": [
            {"datastore": one.datastore, "source": one.source.token, "what": one.what} for one in found.missing
        ],
        "superseded": [
            {"datastore": one.datastore, "source": one.source.token, "what": one.what} for one in found.superseded
        ],
        "unused": [
            {"datastore": one.datastore, "source": one.source.token, "labels": dict(one.labels)} for one in found.unused
        ],
        "errors": [
            {"datastore": name, "class": type(error).__name__, "message": error.message}
            for name, error in found.errors.items()
        ],
    }
