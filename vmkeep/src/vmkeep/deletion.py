"""Deleting an image: its sources, newest first, then its records."""

from __future__ import annotations

from backupcore.context import Progress
from backupcore.errors import UnsupportedOperation
from backupcore.model import Image, SourceRef
from vmkeep import flatten, lock
from vmkeep.catalog import images
from vmkeep.workplace import Workplace

__all__ = ["delete"]


def delete(
    place: Workplace, reference: str, *, progress: Progress | None = None
) -> tuple[Image, tuple[SourceRef, ...]]:
    """Delete the image `reference` and everything it has in its datastore; returns it and its sources, newest first.

    Busy while a backup or a restore works with it. If the datastore fails midway the records stay, and the same call
    goes on where it stopped.
    """
    image = images.find(place.catalog_if_any, reference)
    with lock.image_exclusive(place.state, image, "it is being deleted"):
        image = images.find(place.catalog, image.uuid)
        if image.pinned:
            raise UnsupportedOperation(
                f"image {image.number} is pinned", f"Unpin it first: vmkeep image unpin {image.number}"
            )
        image = flatten.finish_locked(place, image)  # or its result would stay in the datastore, and nobody know it
        store = place.datastore(image.datastore)
        # A chain without its end must not be built on, should this stop midway.
        images.close(place.catalog, image)
        sources = tuple(increment.source for increment in reversed(image.increments))
        with place.context(progress) as ctx:
            ctx.progress.phase("delete")
            store.delete(sources, ctx)
        images.remove(place.catalog, image, place.installation)
    return image, sources
