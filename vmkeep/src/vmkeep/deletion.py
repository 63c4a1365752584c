"""Deleting an image: its sources, newest first, then its records."""

from __future__ import annotations

from backupcore.context import Progress
from backupcore.errors import Locked, UnsupportedOperation
from backupcore.model import Image, SourceRef
from backupcore.typed import typed
from vmkeep import flatten, lock, needed, standing
from vmkeep.catalog import images, places
from vmkeep.workplace import Workplace

__all__ = ["delete"]


def delete(
    place: Workplace, reference: str, *, progress: Progress | None = None
) -> tuple[Image, tuple[SourceRef, ...]]:
    """Delete the image `reference` and everything it has in its datastore; returns it and its sources, newest first.

    Busy while a backup or a restore works with it. UnsupportedOperation where it is pinned, where another installation
    has written it, or where the datastore holds backups that build on it, or that it was merged into, and that the
    catalog does not know. Sources that another image shares stay. If the datastore fails midway the records stay, and
    the same call goes on where it stopped. Locked where the datastore deletes nothing as yet: the image is what it was.
    An image that is absent is forgotten, and its sources stay where they are.
    """
    image = images.find(place.catalog_if_any, reference)
    with lock.image_exclusive(place.state, image, "it is being deleted"):
        image = images.find(place.catalog, image.uuid)
        if image.pinned:
            raise UnsupportedOperation(
                f"image {image.number} is pinned", f"Unpin it first: vmkeep image unpin {image.number}"
            )
        _require_own(place, image)
        image = flatten.finish_locked(place, image)  # or its result would stay in the datastore, and nobody know it
        if image.state == "absent":
            # Where it lies nobody can look: only the catalog's own record goes.
            images.remove(place.catalog, image, place.installation)
            return image, ()
        places.require_here(image, place.config.datastores)
        store = place.datastore(image.datastore)
        with place.context(progress) as ctx:
            ctx.progress.phase("look")
            place.same_place(image.datastore).look(ctx)
            listed = store.sources(ctx, image.vm.uuid)
            known = needed.accounted(place.catalog, image.vm, image.datastore, listed)
            found = standing.look(store, image, listed, known, ctx)
            if found.superseded:
                # What is to go lies in that full, and would stay there without a record.
                raise UnsupportedOperation(found.behind, standing.remedy(image.datastore))
            image = found.image
            others = images.sources(place.catalog, image.datastore, but=image)
            sources = tuple(one.source for one in reversed(image.increments) if one.source not in others)
            needed.require_spared(store, listed, sources, known, ctx, what=f"image {image.number}")
            # A chain without its end must not be built on, should this stop midway.
            images.close(place.catalog, image)
            ctx.progress.phase("delete")
            try:
                store.delete(sources, ctx)
            except Locked:  # it has deleted nothing, so the chain is whole
                if image.state == "open":
                    images.reopen(place.catalog, image)
                raise
        images.remove(place.catalog, image, place.installation)
    return image, sources


def _require_own(place: Workplace, image: Image) -> None:
    owner = image.installation or image.host
    if owner and not place.installation.owns(image):
        raise UnsupportedOperation(
            f"image {image.number} is another installation's, {owner}",
            "It lets go of it by itself. If it is gone for good, take its backups over first: "
            f"{typed('vmkeep catalog take-over', image.datastore, '--from', owner)}",
        )
