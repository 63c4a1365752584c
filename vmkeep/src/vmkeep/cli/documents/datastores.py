"""Documents of datastores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmkeep.cli.figures import iso

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmkeep.adopt_place import Adopted
    from vmkeep.catalog.images import Listed
    from vmkeep.catalog.places import Known
    from vmkeep.cli.documents.parts import Document

__all__ = ["adopted", "shown"]


def shown(name: str, driver: str, known: Known | None, found: Sequence[Listed]) -> Document:
    """``vmkeep datastore show``."""
    here = [one for one in found if one.image.state != "absent"]
    return {
        "name": name,
        "driver": driver,
        "identity": known.identity if known else None,
        "known_since": iso(known.since) if known else None,
        "size": sum(one.size for one in here),
        "images": [one.image.number for one in here],
        "absent": [one.image.number for one in found if one.image.state == "absent"],
    }


def adopted(done: Adopted) -> Document:
    """``vmkeep datastore adopt``."""
    return {
        "name": done.name,
        "driver": done.driver,
        "identity": done.identity,
        "identity_before": done.before.identity if done.before else None,
        "images": [one.number for one in (*done.sorted.here, *done.sorted.moved)],
        "absent": [one.number for one in done.sorted.absent],
        "moved": [{"id": one.number, "from": one.datastore} for one in done.sorted.moved],
    }
