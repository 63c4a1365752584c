"""Verifying: an image's backups read back, and what the catalog makes of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from backupcore import verify as core
from backupcore.chain import lineage
from backupcore.context import Progress
from backupcore.model import Image, Increment
from vmkeep import full_state, lock, standing
from vmkeep.catalog import images, places
from vmkeep.workplace import Workplace

__all__ = ["Result", "verify"]

log = logging.getLogger("vmkeep.verify")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What was found: the image as it is now, its increments, oldest first, and the share of the data that was read.

    Where it is `superseded` nothing was read: it is the catalog that is behind its datastore, and no backup is damaged.
    """

    image: Image
    increments: tuple[core.Verified, ...]
    sample: float
    superseded: bool = False

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
    begins a new one, and retention leaves it alone. The mark goes once all of it was read and is well. Where increments
    have gone into a full that the catalog does not know nothing is read, and that is told, with the remedy; it marks
    nothing. Nor is anything marked where the state folder is full or read-only, with a warning if something is damaged.
    """
    image = images.find(place.catalog_if_any, reference)
    with lock.image_read(place.state, image):
        image = images.find(place.catalog_if_any, image.uuid)
        places.require_here(image, place.config.datastores)
        chain = image.increments if number is None else lineage(image, number)
        store = place.datastore(image.datastore)
        with place.context(progress) as ctx:
            stands = standing.stands(place, store, image, ctx)
            if stands is not None:
                image = stands.image
                chain = image.increments if number is None else lineage(image, number)
            if stands is not None and stands.superseded:
                sample = 0
                found = _superseded(chain, stands)
                if not any(one.id in stands.lost for one in chain):
                    return Result(image=image, increments=found, sample=sample, superseded=True)
            else:
                with place.same_place(image.datastore).blamed(ctx):
                    found = tuple(core.verify(store, image, chain, ctx, sample=sample))
                if any(one.problem for one in found):
                    place.same_place(image.datastore).look(ctx)  # else an unmounted disk would be damage
                lost = stands.lost if stands is not None else {}
                found = tuple(replace(one, problem=lost.get(one.increment.id, one.problem)) for one in found)
        result = Result(image=image, increments=found, sample=sample)
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


def _superseded(chain: Sequence[Increment], stands: standing.Standing) -> tuple[core.Verified, ...]:
    """What is said of increments some of which were merged into a full that the catalog does not know."""
    merged = {one.id for one in stands.superseded}
    problems: dict[int, str] = {}
    for one in chain:
        if one.id in merged:
            problems[one.id] = "superseded: it was merged into a later full, which this catalog does not know"
        elif one.id in stands.lost:
            problems[one.id] = stands.lost[one.id]
        elif one.pid in problems or one.pid in merged:
            problems[one.id] = f"it builds on increment {one.pid}, see there"
    return tuple(core.Verified(increment=one, read=0, problem=problems.get(one.id, "")) for one in chain)
