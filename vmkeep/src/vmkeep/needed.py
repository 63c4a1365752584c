"""Which sources may go: none that something else needs, in this catalog or only in the datastore.

Another installation, or this one before its state folder was put back, may have gone on from a backup that this catalog
knows; all that tells is the datastore. Its labels are enough: they are asked what would be lost, not what is there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from backupcore.errors import IntegrityError, NotFound, UnsupportedOperation
from backupcore.model import VM, Listed, SourceRef, Type
from backupcore.typed import typed
from vmkeep.catalog import flattens, images, runs
from vmkeep.catalog.database import Catalog

if TYPE_CHECKING:
    from backupcore.context import Context
    from backupcore.datastore import Datastore
    from vmkeep.workplace import Workplace

__all__ = ["accounted", "forgotten", "harmed", "known", "number_of", "numbers", "require_spared", "restorable"]


def known(catalog: Catalog, datastore: str) -> set[SourceRef]:
    """Every source that the catalog has in a datastore, those that are still to be deleted among them."""
    return images.sources(catalog, datastore) | flattens.left_in(catalog, datastore)


def accounted(catalog: Catalog, vm: VM, datastore: str, listed: Iterable[Listed]) -> set[SourceRef]:
    """Every source in a datastore that needs no further word: those that are known, and strays of this VM.

    A stray is what a run has stored that failed all the same, or that was killed and is not to be recorded any more:
    nobody was told that it is done. What others build on is none, whatever became of its run here: a state folder that
    was copied in the middle of a backup has that down as running, and once it is put back as killed.
    """
    listed = list(listed)
    found = known(catalog, datastore)
    built_on = {one.labels.get("parent", "") for one in listed if one.source not in found}
    stray = runs.failed_points(catalog, vm.uuid, datastore) - built_on
    return found | {one.source for one in listed if one.labels.get("point") in stray}


def forgotten(place: Workplace, store: Datastore, vm: VM, ctx: Context) -> str:
    """What a datastore holds of a VM that this installation has taken, in words; "" where that is nothing, or where the
    catalog has an image of it there. What it has under another datastore's name is known: there may be two of a place.
    """
    if any(image.datastore == store.name for image in images.where(place.catalog, vm=vm.uuid)):
        return ""
    listed = store.sources(ctx, vm.uuid)
    known_ = accounted(place.catalog, vm, store.name, listed)
    mine = {"vm": vm.uuid, "installation": place.installation.id}
    tokens = set(images.tokens(place.catalog))
    found = [one for one in listed if one.source not in known_ and mine.items() <= dict(one.labels).items()]
    found = [one for one in found if one.source.token not in tokens]
    if not found:
        return ""
    count = f"{len(found)} backup{'s' if len(found) > 1 else ''}"
    last = max(one.labels.get("date", "") for one in found)
    return (
        f"datastore {store.name} holds {count} of this VM, the last of {last}, which this installation has taken and "
        "this catalog does not know"
    )


def harmed(listed: Sequence[Listed], going: Collection[SourceRef], known_: Collection[SourceRef]) -> list[Listed]:
    """Of the sources that are `listed`, those that can be restored now, are not known, and need what is `going`."""
    before = restorable(listed)
    after = restorable(one for one in listed if one.source not in going)
    return [one for one in listed if one.source in before - after - set(known_) - set(going)]


def require_spared(
    store: Datastore,
    listed: Sequence[Listed],
    going: Collection[SourceRef],
    known_: Collection[SourceRef],
    ctx: Context,
    *,
    what: str,
) -> None:
    """UnsupportedOperation where `going`, `what` in words, would take something restorable that is not known."""
    needing = harmed(listed, going, known_)
    # Where the listing is of one VM alone, some may not be complete.
    if not any(_is_whole(store, one, ctx) for one in needing):
        return
    named = ", ".join(f"increment {one.labels.get('number', '?')} (source {one.source})" for one in needing[:3])
    more = f" and {len(needing) - 3} more" if len(needing) > 3 else ""
    raise UnsupportedOperation(
        f"datastore {store.name} holds backups that build on {what} and that this catalog does not know: {named}{more}",
        f"Have the catalog know them first: {typed('vmkeep catalog rebuild', store.name)}",
    )


def _is_whole(store: Datastore, one: Listed, ctx: Context) -> bool:
    from backupcore.survey import look_at  # noqa: PLC0415 - it reads manifests, which is rarely needed

    try:
        look_at(store, one.source, ctx)
    except (IntegrityError, NotFound):
        return False
    return True


def restorable(listed: Iterable[Listed]) -> set[SourceRef]:
    """Of what is listed, those whose chains, by their labels, reach a full."""
    found: set[SourceRef] = set()
    points: set[str] = set()
    for one in sorted(listed, key=number_of):
        labels = one.labels
        if labels.get("point") and (labels.get("type") == Type.FULL.value or labels.get("parent") in points):
            found.add(one.source)
            points.add(labels["point"])
    return found


def number_of(one: Listed) -> int:
    """The number of an increment, as its labels say; 0 where they say none."""
    number = one.labels.get("number", "")
    return int(number) if number.isascii() and number.isdigit() and len(number) < 19 else 0


def numbers(increments: Iterable[int]) -> str:
    """Some increments, in words."""
    found = sorted(set(increments))
    if len(found) > 2 and found == list(range(found[0], found[-1] + 1)):
        return f"increments {found[0]} to {found[-1]}"
    return f"increment{'s' if len(found) > 1 else ''} {', '.join(map(str, found))}"
