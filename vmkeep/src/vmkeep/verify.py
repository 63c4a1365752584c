"""Verifying: an image's backups read back, and what the catalog makes of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from backupcore import verify as core
from backupcore.chain import lineage
from backupcore.context import Progress
from backupcore.model import Image
from vmkeep import full_state, lock
from vmkeep.catalog import images
from vmkeep.workplace import Workplace

__all__ = ["Result", "verify"]

log = logging.getLogger("vmkeep.verify")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What was found: the image as it is now, its increments, oldest first, and the share of the data that was read."""

    image: Image
    increments: tuple[core.Verified, ...]
    sample: float

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not any(one.problem for one in self.increments)


def verify(
    place: Workplace,
    reference: str,
    *,
    number: int | None = None,
    sample: float = 1.0,
    progress: Progress | None = None,
) -> Result:
    """Read the image `reference` back: all of its increments, or those that make up increment `number`.

    `sample` is the share of the data that is read. Where something is damaged the image is marked so: the next backup
    begins a new one, and retention leaves it alone. The mark goes once all of it was read and is well. Where the state
    folder is full or read-only nothing is marked, with a warning if something is damaged.
    """
    image = images.find(place.catalog_if_any, reference)
    with lock.image_read(place.state, image):
        image = images.find(place.catalog_if_any, image.uuid)
        chain = image.increments if number is None else lineage(image, number)
        with place.context(progress) as ctx:
            found = core.verify(place.datastore(image.datastore), image, chain, ctx, sample=sample)
        result = Result(image=image, increments=tuple(found), sample=sample)
        try:
            if not result.ok:
                images.mark(place.catalog, image, damaged=True)
            elif number is None and sample >= 1:
                images.mark(place.catalog, image, damaged=False)
        except full_state.UNWRITABLE as error:
            log.log(
                logging.DEBUG if result.ok else logging.WARNING,
                "that image %d is damaged is not written down: %s",
                image.number,
                error.message,
            )
    return replace(result, image=images.find(place.catalog_if_any, image.uuid))
