"""Flattening an image: locks, the journal, the record, and only then the end of what was merged.

Every step can be the last one of a process: what is written down before it tells the next one what to do. Until the
record the old increments are all there, and so is every restore; after it the new full is, and the old sources are
leftovers that anybody may delete.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from backupcore.chain import lineage
from backupcore.context import Context, Progress
from backupcore.datastore import Datastore
from backupcore.errors import BackupError, ContractViolation, IntegrityError, Locked, UnsupportedOperation
from backupcore.hypervisor import Hypervisor
from backupcore.model import VM, Image, Increment, SourceRef, Stored
from backupcore.typed import typed
from vmkeep import lock, needed, settings, standing
from vmkeep.catalog import flattens, holds, images, places, tokens
from vmkeep.workplace import Workplace

if TYPE_CHECKING:
    from backupcore.flatten import Flattened

__all__ = ["Done", "delete_leftovers", "finish", "finish_locked", "flatten"]

log = logging.getLogger("vmkeep.flatten")


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A flatten that is recorded: the image as it is now, its new full, and the increments that went into it.

    `copied` is true where the store copied on its own side. `warnings` say which old sources could not be deleted.
    """

    image: Image
    full: Increment
    merged: tuple[Increment, ...]
    stored: int | None
    copied: bool
    seconds: float
    warnings: tuple[str, ...] = ()


def flatten(
    place: Workplace,
    reference: str,
    *,
    to: int | None = None,
    everything: bool | None = None,
    held: bool = False,
    progress: Progress | None = None,
) -> Done:
    """Merge the increments of the image `reference` up to `to` (None: all) into one full.

    `everything` reads all of the result back (None: as VERIFY_FLATTEN of the VM says). `held` says that the caller has
    just held the image against its datastore. Busy while a backup, a restore
    or another flatten works with it; UnsupportedOperation where the image is pinned, or is another installation's; what
    the datastore raises leaves everything as it was. Sources that the datastore does not delete are tried again after
    the VM's next backup.
    """
    image = images.find(place.catalog_if_any, reference)
    with lock.image_exclusive(place.state, image, "it is being flattened"):
        image = finish_locked(place, images.find(place.catalog, image.uuid))
        places.require_here(image, place.config.datastores)
        if image.pinned:
            raise UnsupportedOperation(f"image {image.number} is pinned", f"vmkeep image unpin {image.number}")
        if not place.installation.owns(image):
            owner = image.installation or image.host
            raise UnsupportedOperation(
                f"image {image.number} is another installation's, whose catalog would miss what is merged",
                "If that one is gone, take its backups over first: "
                f"{typed('vmkeep catalog take-over', image.datastore, *(['--from', owner] if owner else []))}",
            )
        target = lineage(image, to)[-1].id
        if everything is None:
            everything = _verify_all(place, image.vm)
        store = place.datastore(image.datastore)
        if not held:
            with place.context() as ctx:
                image = standing.current(place, store, image, ctx, number=target)
        steps: list[Flattened] = []
        while not steps or image.increments[0].id < target:
            with place.context(progress) as ctx:
                with place.same_place(image.datastore).blamed(ctx):
                    steps.append(_step(place, image, target, store, ctx, everything=everything))
                image = images.find(place.catalog, image.uuid)
                # Newest first: whatever is left when this is interrupted is the beginning of a chain.
                warnings = delete_leftovers(place, image.vm.uuid, ctx, store)
    between = {step.increment.source for step in steps}
    merged = [one for step in steps for one in step.replaces if one.source not in between]
    return Done(
        image=image,
        full=steps[-1].increment,
        merged=tuple(merged),
        stored=None if any(step.stored is None for step in steps) else sum(step.stored or 0 for step in steps),
        copied=all(step.copied for step in steps),
        seconds=sum(step.seconds for step in steps),
        warnings=tuple(warnings),
    )


def _step(place: Workplace, image: Image, to: int, store: Datastore, ctx: Context, *, everything: bool) -> Flattened:
    """One new full, recorded."""
    from backupcore import flatten as core  # noqa: PLC0415 - the data plane, which most backups do not need

    flattens.begin(place.catalog, image, to)
    stored: list[object] = []

    def told(answer: Stored) -> None:
        tokens.check_new(place.catalog, image.datastore, store.kind, answer.source)
        stored.append(answer)

    try:
        done = core.flatten(
            store,
            image,
            to,
            ctx,
            host=place.installation.host,
            installation=place.installation.id,
            everything=everything,
            room=flattens.room(place.catalog, image, to),
            stored=told,
        )
        place.same_place(image.datastore).look_before_record(ctx)
    except BaseException as error:
        # A result that is stored, and could not be proved for another reason than damage, is looked for by `finish`.
        if not stored or isinstance(error, IntegrityError):
            flattens.undo(place.catalog, image)
        raise
    ctx.progress.phase("record")
    try:
        flattens.record(place.catalog, image, done, driver=store.kind)
    except ContractViolation:  # the result lies where another backup did: it is nobody's to be found again
        flattens.undo(place.catalog, image)
        raise
    ctx.progress.phase("delete")
    return done


def finish(place: Workplace, image: Image) -> Image:
    """If a flatten of `image` was interrupted, record its result where that is complete and proved, else undo it.

    Returns the image as it is then. Busy, saying what works on it, while that is going on.
    """
    if image.state != "flattening":
        return image
    with lock.image_exclusive(place.state, image, "a flatten that was interrupted is being finished"):
        return finish_locked(place, images.find(place.catalog, image.uuid))


def finish_locked(place: Workplace, image: Image) -> Image:
    """`finish`, for a caller that has the image's lock."""
    if flattens.begun(place.catalog, image) is None:
        return image
    from backupcore import flatten as core  # noqa: PLC0415 - as above

    store = place.datastore(image.datastore)
    # Those of other images, too: a driver that gave a token for the second time has left its result under it.
    known = [SourceRef(token) for token in images.tokens(place.catalog)]
    with place.context() as ctx:
        found = core.find(store, image, known, ctx, everything=_verify_all(place, image.vm))
    if found is None:
        flattens.undo(place.catalog, image)
        log.warning("a flatten of image %d was interrupted; nothing of it is left", image.number)
    else:
        flattens.record(place.catalog, image, found, driver=store.kind)
        log.warning("a flatten of image %d was interrupted; it is finished now", image.number)
    return images.find(place.catalog, image.uuid)


def delete_leftovers(place: Workplace, vm: str, ctx: Context, store: Datastore | None = None) -> list[str]:
    """Delete what flattens of `vm` (UUID) have left, newest first; returns what could not be deleted, and why.

    With `store` only there: another datastore of the VM may be a disk that is seldom mounted.
    What the datastore keeps by a lock or a policy is noted (`catalog.holds`) and put off.
    """
    left = flattens.leftovers(place.catalog, vm)
    now = datetime.now(UTC)
    refusing = _refusing(place, now) if left else set()
    warnings = []
    for name in sorted({one.datastore for one in left if store is None or one.datastore == store.name} - refusing):
        these = [one for one in left if one.datastore == name]
        # Another image may have gone on from one of them: it goes with that one.
        others = images.sources(place.catalog, name)
        these = [one for one in these if one.source not in others]
        going = [one.source for one in these]
        if not these:
            continue
        try:
            opened = store or place.datastore(name)
            listed = opened.sources(ctx, vm)
            known = needed.accounted(place.catalog, VM(uuid=vm, name=""), name, listed)
            needed.require_spared(opened, listed, going, known, ctx, what="them")
            opened.delete(going, ctx)
        except Locked as error:  # as somebody wanted it: told once, and put off
            kind = holds.LOCK if error.until else holds.POLICY
            if image := _last(place, vm, name):
                holds.hold(place.catalog, image.number, error.until, kind, now)
            log.info("%d old backups in %s are merged, and stay for now: %s", len(these), name, error.in_full)
        except BackupError as error:
            count = f"{len(these)} old backups in {name}"
            warnings.append(f"{count} are merged, but could not be deleted: {error.in_full}")
        else:
            flattens.drop(place.catalog, these)
            holds.release(place.catalog, name)
    return warnings


def _refusing(place: Workplace, now: datetime) -> set[str]:
    """The datastores that have deleted nothing when they were last asked, not long ago."""
    held = {number for number, one in holds.active(place.catalog, now).items() if one.kind == holds.POLICY}
    return {one.datastore for one in images.where(place.catalog) if one.number in held} if held else set()


def _last(place: Workplace, vm: str, datastore: str) -> Image | None:
    """The newest image that the VM (UUID) has there, or any image there."""
    found = [one for one in images.where(place.catalog) if one.datastore == datastore]
    return next((one for one in reversed(found) if one.vm.uuid == vm), found[-1] if found else None)


def _verify_all(place: Workplace, vm: VM) -> bool:
    """What VERIFY_FLATTEN says; the default where the hypervisor or the VM is not there to say."""
    own: dict[str, str] = {}
    try:
        hypervisor: Hypervisor = place.hypervisor
        own = dict(hypervisor.settings(vm))
    except BackupError:
        log.info("the settings of VM %s cannot be asked for; the defaults count", vm.name)
    return settings.effective(own, place.config.defaults, vm.name)["VERIFY_FLATTEN"] == "ALL"
