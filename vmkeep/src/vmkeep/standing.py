"""An image as the catalog has it, held against what its datastore lists: what moved, what is lost, what came after it.

The datastore is the truth, the catalog its index. Which sources there are is told by one listing; whether one is what
the catalog means is told by its manifest alone, and that is read only where the two do not agree.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from backupcore.chain import lineage
from backupcore.errors import BackupError, IntegrityError, NotFound, SourceNotFound, UnsupportedOperation
from backupcore.model import VM, Image, Increment, Listed, SourceRef, Type
from backupcore.typed import typed
from vmkeep import full_state, needed
from vmkeep.catalog import corrections, images
from vmkeep.needed import number_of, numbers

if TYPE_CHECKING:
    from backupcore.context import Context
    from backupcore.datastore import Datastore
    from backupcore.manifest import Manifest
    from backupcore.survey import Found
    from vmkeep.workplace import Workplace

__all__ = ["Held", "Standing", "current", "hold", "look", "merged_to", "remedy", "stands"]

log = logging.getLogger("vmkeep.standing")


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How an image stands.

    `image` has the sources under the tokens that they have now; `moved` are those that have another than the catalog
    says, by increment. `lost` are the increments whose sources are gone, with what is said of each, `torn` those of
    whose sources a part is; `superseded` those whose sources are gone because a later full stands for them, which the
    catalog does not know. `newer` are sources that go on after the image's last increment, and that it does not know
    either; `others` are those of the image that it has no more of as well, where it has lost some: a store that was put
    back from a copy of before.
    """

    image: Image
    moved: Mapping[int, SourceRef]
    lost: Mapping[int, str]
    torn: Mapping[int, str]
    superseded: tuple[Increment, ...]
    newer: tuple[Listed, ...]
    others: tuple[Listed, ...] = ()

    @property
    def behind(self) -> str:
        """What the datastore has of the image that the catalog does not know, in words; "" if nothing."""
        told = []
        if self.superseded:
            told.append(f"a later full that {numbers(one.id for one in self.superseded)} went into")
        if self.newer:
            told.append(f"newer backups ({numbers(number_of(one) for one in self.newer)})")
        if self.others:
            told.append(f"other backups ({numbers(number_of(one) for one in self.others)})")
        if not told:
            return ""
        return (
            f"datastore {self.image.datastore} holds {' and '.join(told)} of image {self.image.number}, which this "
            "catalog does not know"
        )


def remedy(datastore: str) -> str:
    """What to do where the catalog is behind its datastore."""
    return f"Have the catalog know them: {typed('vmkeep catalog rebuild', datastore)}"


def look(
    store: Datastore,
    image: Image,
    listed: Sequence[Listed],
    known: Collection[SourceRef],
    ctx: Context,
    *,
    whole: bool = False,
) -> Standing:
    """Hold an image against what its datastore lists. `known` are all sources that the catalog has there.

    With `whole` those are looked into that are listed with another size than they had. A listing that shows none of
    what the catalog knows is not believed: then each is asked for by its own token, too.
    """
    there = {one.source: one for one in listed}
    unknown = [one for one in listed if one.source not in known]
    seen = any(source in there for source in known)
    moved: dict[int, SourceRef] = {}
    lost: dict[int, str] = {}
    torn: dict[int, str] = {}
    superseded: list[Increment] = []
    # What other backups call this image: one that a rebuild has found beside another has a UUID of its own.
    own = [there[one.source].labels for one in image.increments if one.source in there]
    names = {image.uuid, *(labels["image"] for labels in own if "image" in labels)}
    fulls = [one for one in unknown if one.labels.get("image") in names and one.labels.get("type") == Type.FULL.value]
    looked: dict[SourceRef, Found | None] = {}
    for row in image.increments:
        entry = there.get(row.source)
        if entry is not None:
            why = _why_not_whole(store, row, entry, ctx) if whole else ""
            if why:
                torn[row.id] = f"increment {row.id} of image {image.number} is not whole any more: {why}"
            continue
        ctx.check()
        same = [one for one in unknown if one.labels.get("point") == row.point]
        found = next((one for one in same if _is(row, _looked(store, one, looked, ctx))), None)
        if found is not None:
            moved[row.id] = found.source
        elif any(
            row.id <= number_of(one) and _stands_for(image, row, _looked(store, one, looked, ctx)) for one in fulls
        ):
            superseded.append(row)
        elif seen or _is_gone(store, row, ctx):
            lost[row.id] = (
                f"increment {row.id} of image {image.number} (source {row.source}) is no longer in datastore "
                f"{image.datastore}: something else has removed it"
            )
    newer = _newer(image, unknown, names, superseded)
    while newer and _looked(store, newer[0], looked, ctx) is None:  # those of one VM may be listed incomplete
        newer = newer[1:]
    rows = tuple(replace(row, source=moved.get(row.id, row.source)) for row in image.increments)
    others: list[Listed] = []
    if lost:
        there_yet = max((row.id for row in image.increments if row.id not in lost), default=-1)
        others = _others_of(names, listed, [one for one in unknown if one not in newer], after=there_yet)
    while others and _looked(store, others[-1], looked, ctx) is None:
        others.pop()
    return Standing(
        image=replace(image, increments=rows),
        moved=moved,
        lost=lost,
        torn=torn,
        superseded=tuple(superseded),
        newer=newer,
        others=tuple(others),
    )


def _newer(
    image: Image, unknown: Sequence[Listed], names: Collection[str | None], superseded: Sequence[Increment]
) -> tuple[Listed, ...]:
    """What goes on after the image's last increment, as the labels say; where that one was merged, by the numbers."""
    if not image.increments:
        return ()
    tip = image.increments[-1]
    points = {tip.point}
    found = []
    for one in sorted(unknown, key=number_of):
        labels = one.labels
        follows = labels.get("parent") in points or (tip in superseded and labels.get("image") in names)
        if follows and number_of(one) > tip.id and labels.get("point"):
            points.add(labels["point"])
            found.append(one)
    return tuple(found)


def _others_of(
    names: Collection[str | None], listed: Sequence[Listed], unknown: Sequence[Listed], *, after: int
) -> list[Listed]:
    """What can be restored of an image, as the labels say, and is not known; not what was merged into what is."""
    whole = needed.restorable(listed)
    found = [one for one in unknown if one.labels.get("image") in names and one.source in whole]
    return sorted((one for one in found if number_of(one) > after), key=number_of)


def _is_gone(store: Datastore, row: Increment, ctx: Context) -> bool:
    """Whether a source is not there when it is asked for by its token.

    SourceNotFound counts here, since `same_place` lets it through only where the place is the one that is known.
    """
    try:
        store.artifacts(row.source, ctx)
    except SourceNotFound:
        return True
    return False


def _why_not_whole(store: Datastore, row: Increment, entry: Listed, ctx: Context) -> str:
    """Why a source cannot be restored that is listed with another size than it had; "" if it can."""
    if entry.size is None or entry.size == row.size:
        return ""
    from backupcore.survey import look_at  # noqa: PLC0415 - it reads manifests, which few backups do

    try:
        look_at(store, row.source, ctx)
    except (IntegrityError, SourceNotFound) as error:
        return error.message
    return ""


def _looked(store: Datastore, one: Listed, looked: dict[SourceRef, Found | None], ctx: Context) -> Found | None:
    """What a source holds; None where it is not whole."""
    from backupcore.survey import look_at  # noqa: PLC0415 - as above

    if one.source not in looked:
        try:
            looked[one.source] = look_at(store, one.source, ctx)
        except (IntegrityError, NotFound, UnsupportedOperation) as error:
            log.info("source %s: %s", one.source, error)
            looked[one.source] = None
    return looked[one.source]


def _is(row: Increment, found: Found | None) -> bool:
    return found is not None and (found.digest, found.manifest.point) == (row.digest, row.point)


def _stands_for(image: Image, row: Increment, found: Found | None) -> bool:
    """Whether a full is that into which an increment was merged."""
    return found is not None and row.id <= merged_to(image, found.manifest)


def merged_to(image: Image, manifest: Manifest) -> int:
    """The last increment of an image that went into a full, with all before it; -1 if none did.

    A second merge does not name what the first one took: that came before all that it names. An increment that has the
    number of one that is named, and is another, is at another end of the chain.
    """
    if not manifest.replaces:
        return -1
    named = [one.id for one in image.increments if one.point in manifest.replaces]
    return max([manifest.number - len(manifest.replaces), *named])


def stands(place: Workplace, store: Datastore, image: Image, ctx: Context) -> Standing | None:
    """How the image stands, told where the datastore has more of it; None where that datastore cannot list.

    Sources that moved are put right. What is lost is not written down: a backup of the VM does.
    """
    try:
        listed = store.sources(ctx, image.vm.uuid)
        known = needed.accounted(place.catalog_if_any, image.vm, image.datastore, listed)
        found = look(store, image, listed, known, ctx)
    except BackupError as error:
        ctx.check()
        log.info("datastore %s was not held against the catalog: %s", image.datastore, error)
        return None
    _write(place, found)
    if found.behind:
        log.warning("%s. %s", found.behind, remedy(image.datastore))
    return found


def current(place: Workplace, store: Datastore, image: Image, ctx: Context, *, number: int | None = None) -> Image:
    """The image as it can be read now, for a verb that reads increment `number` (None: its last) of it.

    Sources that moved are put right; that the datastore holds newer ones is told, with the remedy. NotFound, with it,
    where the increment was merged into a full that the catalog does not know; SourceNotFound where it is lost. A
    datastore that cannot list may still be read: then the image is returned as it is.
    """
    found = stands(place, store, image, ctx)
    if found is None:
        return image
    if not image.increments:
        return found.image
    chain = {one.id for one in lineage(found.image, number)}
    if any(one.id in chain for one in found.superseded):
        raise NotFound(
            f"increment {max(chain)} of image {image.number} cannot be read as this catalog knows it: {found.behind}",
            remedy(image.datastore),
        )
    gone = [why for one, why in found.lost.items() if one in chain]
    if gone:
        raise SourceNotFound(gone[0], _others(image, found))
    return found.image


def _others(image: Image, found: Standing) -> str:
    """Which increments can be restored instead."""
    able = []
    for one in image.increments:
        if not {link.id for link in lineage(image, one.id)} & {*found.lost, *(it.id for it in found.superseded)}:
            able.append(one.id)
    return f"These can be restored: {numbers(able)}." if able else "None of the image can be restored any more."


def _write(place: Workplace, found: Standing) -> None:
    """Put down what moved. Where that is not possible the next verb finds it out anew."""
    if found.moved:
        try:
            corrections.move(place.catalog, found.image, found.moved)
        except full_state.UNWRITABLE as error:
            log.info("where the sources of image %d are now is not written down: %s", found.image.number, error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a backup has found out of its VM's images: `warnings` for the user, and why no increment can be added.

    `newest` is the image that the run was to add to, as it is now; `why_full` is "" where it still can.
    """

    warnings: tuple[str, ...]
    newest: Image | None
    why_full: str = ""


def hold(place: Workplace, store: Datastore, ctx: Context, *, vm: VM, datastore: str, newest: Image | None) -> Held:
    """Hold every image of a VM against its datastore before a backup, and write down what was found.

    The caller has the VM's lock. What is lost is marked at once; the image `newest` is closed where the datastore has
    more of it than the catalog, since an increment on top of what the catalog knows would make a second end of it.
    """
    of_vm = [one for one in images.where(place.catalog, vm=vm.uuid) if one.datastore == datastore and one.increments]
    if not of_vm:
        return Held(warnings=(), newest=newest)
    ctx.progress.phase("look")
    # What is known, and there, needs no labels: some stores tell that at once, and not who else has stored something.
    listed = store.sources(ctx, vm.uuid, known=needed.known(place.catalog, datastore))
    known = needed.accounted(place.catalog, vm, datastore, listed)
    warnings: list[str] = []
    why = ""
    for image in of_vm:
        if image.state in ("flattening", "absent"):
            continue  # another process is at it; it lies in another place
        found = look(store, image, listed, known, ctx, whole=True)
        gone = {**found.lost, **found.torn}
        _write(place, found)
        own = place.installation.owns(image)
        before = corrections.lost(place.catalog, image)
        if set(before) != set(gone):
            corrections.mark(place.catalog, image, gone)
        fresh = [gone[number] for number in sorted(gone) if number not in before]
        # What another installation lets go of, or goes on with, is its own business.
        if own and fresh:
            warnings.append(f"{fresh[0]}{f' ({len(fresh) - 1} more)' if len(fresh) > 1 else ''}")
        if own and found.behind:
            warnings.append(f"{found.behind}. {remedy(datastore)}")
        if newest is not None and image.uuid == newest.uuid:
            why = next((gone[number] for number in sorted(gone)), "") or found.behind
            if why and own:
                images.close(place.catalog, image, why)
            newest = found.image
    return Held(warnings=tuple(warnings), newest=newest, why_full=why)
