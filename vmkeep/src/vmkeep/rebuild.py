"""The catalog held against the datastores: what it lacks, what they lack, and what they hold that nobody uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from backupcore.context import Progress
from backupcore.errors import BackupError, Busy, NotFound
from backupcore.model import Image, Listed, SourceRef
from backupcore.survey import Remark, survey
from vmkeep import lock
from vmkeep.catalog import flattens, images
from vmkeep.catalog.database import Catalog
from vmkeep.workplace import Workplace

__all__ = ["Checked", "Missing", "Rebuilt", "Unused", "check", "rebuild"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """What a rebuild did: the images that are in the catalog now and were not before, by number.

    `known` counts the sources that it had already, `remarks` are those that belong to no image, `busy` the images that
    wait for the end of a backup. `foreign` says how many of those that were added are whose (an ID, or a host's name),
    where they are not this installation's.
    """

    datastore: str
    added: tuple[Image, ...]
    known: int
    remarks: tuple[Remark, ...]
    busy: tuple[str, ...]
    foreign: Mapping[str, int]


def rebuild(place: Workplace, name: str, *, progress: Progress | None = None) -> Rebuilt:
    """Add every image to the catalog that the datastore holds and the catalog does not know.

    What the catalog knows stays as it is, so a second time there is nothing to add. The images are closed: where a
    VM's disks lay is not in the datastore, and an increment needs it. Nothing in the datastore is changed.
    """
    name = place.config.datastore(name)
    store = place.datastore(name)
    known = _known(place.catalog, name)
    with place.context(progress) as ctx:
        found = survey(store, ctx, known=known)
        added: list[Image] = []
        remarks = [_in_known(place.catalog, one) for one in found.remarks]
        busy: list[str] = []
        ctx.progress.phase("record")
        for image in found.images:
            ctx.check()
            try:
                # A backup that is just between its datastore and the catalog must find its image as it left it.
                with lock.vm_run(place.state, image.vm):
                    number = images.add(place.catalog, replace(image, why_closed=_WHY_CLOSED))
            except Busy as error:
                busy.append(f"image {image.uuid}: {error.message}")
                continue
            if number is not None:
                added.append(replace(image, number=number))
            else:
                remarks += _of_known(place.catalog, image)
    foreign = Counter(one.installation or one.host for one in added if not place.installation.owns(one))
    return Rebuilt(
        datastore=name,
        added=tuple(added),
        known=len(known),
        remarks=tuple(remarks),
        busy=tuple(busy),
        foreign=foreign,
    )


def _in_known(catalog: Catalog, remark: Remark) -> Remark:
    """The remark, but for a source of an image that the catalog knows: what that builds on was not looked at."""
    try:
        there = images.find(catalog, remark.image)
    except NotFound:
        return remark
    return replace(
        remark, kind="unused", why=f"{remark.why.partition(': ')[0]}: not among those of image {there.number}"
    )


def _of_known(catalog: Catalog, image: Image) -> list[Remark]:
    """Remarks about what was found of an image that the catalog knows without it."""
    there = images.find(catalog, image.uuid)
    where = "" if there.datastore == image.datastore else f" in datastore {there.datastore}"
    known = {increment.source for increment in there.increments}
    return [
        Remark(
            source=one.source,
            kind="unused",
            why=f"increment {one.id}, VM {image.vm.name}: not among those of image {there.number}{where}",
        )
        for one in image.increments
        if one.source not in known
    ]


def _known(catalog: Catalog, name: str) -> dict[SourceRef, str]:
    """Every source that the catalog has in this datastore, and what it is."""
    found = {
        increment.source: f"increment {increment.id} of image {image.number}, VM {image.vm.name}"
        for image in images.where(catalog)
        if image.datastore == name
        for increment in image.increments
    }
    for owner in flattens.owners(catalog):
        for left in flattens.leftovers(catalog, owner):
            if left.datastore == name:
                found[left.source] = _LEFT
    return found


_WHY_CLOSED = "the image was found by a rebuild of the catalog, which does not know where the disks lay then"
_LEFT = "merged into a later full; it goes with the VM's next backup"


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A source that the catalog has and its datastore has not."""

    datastore: str
    source: SourceRef
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unused:
    """A source that a datastore has and this host's catalog has not; its labels say what it is."""

    datastore: str
    source: SourceRef
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """The catalog held against the datastores. `errors` are of those that could not be asked, by name."""

    datastores: tuple[str, ...]
    missing: tuple[Missing, ...]
    unused: tuple[Unused, ...]
    errors: Mapping[str, BackupError]


def check(place: Workplace, name: str | None = None, *, progress: Progress | None = None) -> Checked:
    """Hold the catalog against one datastore, or against all. Nothing is changed, and no data are read."""
    names = [place.config.datastore(name)] if name is not None else list(place.config.datastores)
    missing: list[Missing] = []
    unused: list[Unused] = []
    errors: dict[str, BackupError] = {}
    with place.context(progress) as ctx:
        for one in names:
            ctx.progress.phase(f"look into {one}")
            before = _known(place.catalog_if_any, one)
            try:
                listed = {found.source: found for found in place.datastore(one).sources(ctx)}
            except BackupError as error:
                ctx.check()
                errors[one] = error
                continue
            # Twice, since backups are recorded and deleted meanwhile.
            after = _known(place.catalog_if_any, one)
            missing += [
                Missing(datastore=one, source=source, what=what)
                for source, what in before.items()
                if source in after and source not in listed and what != _LEFT
            ]
            unused += [
                _unused(one, found) for source, found in listed.items() if source not in before and source not in after
            ]
    return Checked(datastores=tuple(names), missing=tuple(missing), unused=tuple(unused), errors=errors)


def _unused(datastore: str, found: Listed) -> Unused:
    return Unused(datastore=datastore, source=found.source, labels=found.labels)
