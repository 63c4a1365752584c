"""The catalog held against the datastores: what it lacks, what they lack, and what they hold that nobody uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from blake3 import blake3

from backupcore.context import Context, Progress
from backupcore.datastore import Datastore
from backupcore.errors import BackupError, Busy
from backupcore.model import VM, Image, Increment, Listed, SourceRef
from backupcore.survey import Branch, Found, Remark, put_together, read, stood_for
from backupcore.typed import typed
from vmkeep import flatten, lock, needed, standing
from vmkeep.catalog import corrections, flattens, images
from vmkeep.catalog.database import Catalog
from vmkeep.workplace import Workplace

__all__ = ["Change", "Checked", "Missing", "Rebuilt", "Unused", "check", "rebuild"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """An image that the catalog knew, and as which it has it now.

    Of its increments, by ID: `added` were not known; `merged` have gone into the full `into`; `moved` have another
    source; `lost` have none any more, or one that is not whole, and `back` have one again.
    """

    before: Image
    after: Image
    added: tuple[int, ...] = ()
    merged: tuple[int, ...] = ()
    into: int | None = None
    moved: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()
    back: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """What a rebuild did: the images that are in the catalog now and were not before, by number, and what it changed of
    those that were.

    `known` counts the sources that it had already, `remarks` are those that belong to no image, `busy` the images that
    wait for the end of a backup. `foreign` says how many of those that were added are whose (an ID, or a host's name),
    where they are not this installation's. `kept` is the catalog of before, where something in it was changed. With
    `dry_run` nothing was done: the images that would be added have no number.
    """

    datastore: str
    added: tuple[Image, ...]
    changed: tuple[Change, ...]
    known: int
    remarks: tuple[Remark, ...]
    busy: tuple[str, ...]
    foreign: Mapping[str, int]
    kept: Path | None = None
    dry_run: bool = False


def rebuild(place: Workplace, name: str, *, dry_run: bool = False, progress: Progress | None = None) -> Rebuilt:
    """Have the catalog say what the datastore holds. Nothing in the datastore is changed; `dry_run` changes nothing.

    Images that it does not know are added, closed: where a VM's disks lay is not in the datastore, and an increment
    needs it. One that it knows gets the increments that go on after its last, and the full that some of its own were
    merged into, where every link of the chain fits; it is closed by that, if it was open, so that nothing is ever built
    on what the datastore alone says. What the datastore has lost is marked. All else stays as it is, so a second time
    there is nothing to do.
    """
    name = place.config.datastore(name)
    store = place.datastore(name)
    busy: list[str] = [] if dry_run else _finish_flattens(place, name)
    catalog = place.catalog_if_any if dry_run else place.catalog
    with place.context(progress) as ctx:
        ctx.progress.phase("look")
        known = needed.known(catalog, name)
        there = [image for image in images.where(catalog) if image.datastore == name]
        listed = store.sources(ctx)
        found, remarks = _read(place, store, catalog, there, listed, ctx=ctx)
        branches, others = put_together(name, found, prefer={one.source for image in there for one in image.increments})
        plan = _Plan(place, catalog, name, there, branches, {one.source: one for one in listed}, known)
        plan.make(store, ctx)
        if plan.added and not dry_run:
            place.same_place(name).look_before_record(ctx)  # later it may list nothing any more of what is found now
        ctx.progress.phase("record")
        done = plan if dry_run else _carry_out(place, plan, busy, ctx)
    unused = [*remarks, *others, *plan.elsewhere]
    foreign = Counter(one.installation or one.host for one in done.added if not place.installation_if_any.owns(one))
    return Rebuilt(
        datastore=name,
        added=tuple(done.added),
        changed=tuple(done.changed),
        known=len(known),
        remarks=tuple(_in_known(there, one, known) for one in unused if one.source not in plan.leftovers),
        busy=tuple(busy),
        foreign=foreign,
        kept=done.kept,
        dry_run=dry_run,
    )


def _finish_flattens(place: Workplace, name: str) -> list[str]:
    """Finish, or undo, the flattens that were interrupted: until then an image is not what the catalog says."""
    busy = []
    for number in flattens.unfinished(place.catalog):
        for image in images.where(place.catalog, number=number):
            if image.datastore != name:
                continue
            try:
                flatten.finish(place, image)
            except Busy as error:
                busy.append(f"image {image.number}: {error.message}")
    return busy


def _read(
    place: Workplace,
    store: Datastore,
    catalog: Catalog,
    there: Sequence[Image],
    listed: Sequence[Listed],
    *,
    ctx: Context,
) -> tuple[tuple[Found, ...], tuple[Remark, ...]]:
    """The manifests of every VM of which the catalog and the datastore do not say the same.

    What is to be deleted is none of it, nor what runs have stored that are down as failed.
    """
    left = flattens.left_in(catalog, store.name)
    vms = {image.vm.uuid: image.vm for image in there}
    known = needed.known(catalog, store.name)
    strays = {source for vm in vms.values() for source in needed.accounted(catalog, vm, store.name, listed) - known}
    usable = [one for one in listed if one.source not in left and one.source not in strays]
    whose = {row.source: image.vm.uuid for image in there for row in image.increments}
    tokens = {one.source for one in usable}
    differ = {one.labels.get("vm", "") for one in usable if one.source not in whose}
    differ |= {whose[source] for source in whose if source not in tokens}
    differ |= {image.vm.uuid for image in there if corrections.lost(catalog, image)}
    ctx.progress.phase("read manifests")
    found: dict[SourceRef, Found] = {}
    remarks = [Remark(source=one, kind="unused", why="a run that failed has stored it") for one in strays]
    asked: set[SourceRef] = set()
    while True:
        due = [one for one in usable if one.source not in asked]
        due = [one for one in due if whose.get(one.source, "") in differ or one.source not in whose]
        if not due:
            return tuple(found.values()), tuple(remarks)
        asked |= {one.source for one in due}
        more, said = read(store, due, ctx)
        found |= {one.source: one for one in more}
        remarks += said
        # Whose a source is says its manifest: labels can be anything.
        differ |= {one.manifest.vm.uuid for one in more}


def _in_known(there: Sequence[Image], remark: Remark, known: Collection[SourceRef]) -> Remark:
    """The remark, with the number of the image that the catalog knows, where its source is none of that one's."""
    image = next((one for one in there if one.uuid == remark.image), None)
    if image is None or remark.source in known or remark.kind != "unused":
        return remark
    return replace(remark, why=remark.why.replace(f"image {image.uuid}", f"image {image.number}"))


_WHY_CLOSED = "the image was found by a rebuild of the catalog, which does not know where the disks lay then"
_WHY_CHANGED = "a rebuild of the catalog has found more of the image, and does not know where the disks lay then"
_ELSEWHERE = "it lies in another place than the datastore is now"
_LEFT = "merged into a later full; it goes with the VM's next backup"


@dataclass
class _Plan:
    """What is to be added and changed; after `_carry_out`, what was."""

    place: Workplace
    catalog: Catalog
    name: str
    there: Sequence[Image]
    branches: Sequence[Branch]
    listed: Mapping[SourceRef, Listed]
    known: Collection[SourceRef]
    added: list[Image] = field(default_factory=list)
    changed: list[Change] = field(default_factory=list)
    elsewhere: list[Remark] = field(default_factory=list)
    kept: Path | None = None

    @property
    def leftovers(self) -> set[SourceRef]:
        return flattens.left_in(self.catalog, self.name)

    def make(self, store: Datastore, ctx: Context) -> None:
        """Find out which branch each image is, then what that changes; branches that are none are new images."""
        every = images.where(self.catalog)
        taken = {image.uuid: image for image in every}
        pairs = self._pairs()
        for image in self.there:
            branch = pairs.get(image.uuid)
            if image.state in ("flattening", "absent"):
                if image.state == "absent" and branch is not None:
                    self.elsewhere += _absent(branch, image)
                continue
            change = self._change(image, branch, store, ctx)
            if change is not None:
                self.changed.append(change)
        matched = {id(branch) for branch in pairs.values()}
        shared = [{one.manifest.point for one in other.chain} for other in self.branches]
        for at, branch in enumerate(self.branches):
            if id(branch) in matched:
                continue
            other = taken.get(branch.image.uuid)
            if other is not None and other.datastore != self.name:
                self.elsewhere += _of_other(branch.image, other)
                continue
            rest = {point for number, points in enumerate(shared) if number != at for point in points}
            merged = {point for one in self.branches if one is not branch for point in stood_for(one.chain)}
            if shared[at] <= rest | merged:
                self.elsewhere += _merged(branch)
                continue
            uuid = branch.image.uuid
            if uuid in taken:
                uuid = _own_uuid(branch, rest, taken)
            image = replace(branch.image, uuid=uuid, why_closed=_WHY_CLOSED)
            taken[uuid] = image
            self.added.append(image)

    def _pairs(self) -> dict[str, Branch]:
        """Which branch is which image of the catalog: the one that it is, else the one that goes on after it."""
        pairs: dict[str, Branch] = {}
        free = list(self.branches)
        ranked = sorted(
            (
                (self._likeness(image, branch), -at, image.uuid)
                for image in self.there
                for at, branch in enumerate(free)
            ),
            reverse=True,
        )
        taken: set[int] = set()
        for likeness, at, uuid in ranked:
            if likeness > (0,) and uuid not in pairs and -at not in taken:
                pairs[uuid] = free[-at]
                taken.add(-at)
        return pairs

    def _likeness(self, image: Image, branch: Branch) -> tuple[int, ...]:
        """How well a branch fits an image, (0,) where it does not."""
        if not image.increments or image.vm.uuid != branch.image.vm.uuid:
            return (0,)
        points = {one.manifest.number: one.manifest.point for one in branch.chain}
        if any(points.get(row.id, row.point) != row.point for row in image.increments):
            return (0,)  # somebody went on otherwise
        held = {*points.values(), *stood_for(branch.chain)}
        common = sum(row.point in held for row in image.increments)
        tip = image.increments[-1]
        if not common:
            first = branch.chain[0].manifest
            gone = not any(row.source in self.listed for row in image.increments)
            merged = gone and first.image == image.uuid and tip.id <= standing.merged_to(image, first)
            return (1, 0, 0, 0) if merged else (0,)
        same = branch.chain[-1].manifest.point == tip.point
        return (2 + same, tip.point in held, branch.image.installation == image.installation, common)

    def _change(self, image: Image, branch: Branch | None, store: Datastore, ctx: Context) -> Change | None:
        rows = {row.id: row for row in image.increments}
        marked = corrections.lost(self.catalog, image)
        chain = {one.id: one for one in branch.image.increments} if branch else {}
        new = {number for number, one in chain.items() if number not in rows or rows[number].digest != one.digest}
        stands = standing.look(store, image, [*self.listed.values()], self.known, ctx, whole=True)
        if not new:
            gone = {**stands.lost, **stands.torn}
            after = stands.image
            if not stands.moved and set(gone) == set(marked):
                return None
            return Change(
                before=image,
                after=after,
                moved=tuple(sorted(stands.moved)),
                lost=tuple(sorted(set(gone) - set(marked))),
                back=tuple(sorted(set(marked) - set(gone))),
            )
        assert branch is not None
        fulls = [one.manifest for one in branch.chain if one.manifest.replaces and one.manifest.number in new]
        into = max(fulls, key=lambda one: one.number, default=None)
        first = branch.chain[0].manifest
        replaced = stood_for(branch.chain)
        superseded = {one.id for one in stands.superseded}
        merged = {
            number
            for number, row in rows.items()
            if number not in chain and (row.point in replaced or number in superseded) and number <= first.number
        }
        if into is not None:
            merged |= {number for number in new if number in rows}
        stay = [row for number, row in rows.items() if number not in chain and number not in merged]
        after = replace(
            branch.image,
            uuid=image.uuid,
            number=image.number,
            pinned=image.pinned,
            why_closed=_WHY_CHANGED,
            increments=tuple(sorted([*chain.values(), *stay], key=lambda one: one.id)),
            # Who has written what is new goes on with the image, whoever has taken it over meanwhile.
            installation=branch.image.installation or image.installation,
        )
        return Change(
            before=image,
            after=after,
            added=tuple(sorted(new - set(rows))),
            merged=tuple(sorted(merged)),
            into=into.number if into is not None else None,
            moved=tuple(sorted(n for n, one in chain.items() if n not in new and rows[n].source != one.source)),
            lost=tuple(sorted({row.id for row in stay if row.id in stands.lost} - set(marked))),
            back=tuple(sorted(set(marked) & (set(chain) | merged))),
        )


def _own_uuid(branch: Branch, others: Collection[str], taken: Collection[str]) -> str:
    """A UUID for a second end of an image, made from the first point that it has for itself: the same on every host."""
    points = [one.manifest.point for one in branch.chain]
    own = next((point for point in points if point not in others), points[-1])
    uuid = branch.image.uuid
    while uuid in taken:
        uuid = blake3(f"{uuid} {own}".encode()).hexdigest()[:32]
    return uuid


def _absent(branch: Branch, image: Image) -> list[Remark]:
    """Remarks about what was found of an image that was said to be elsewhere."""
    how = f"it is absent as long as nobody says {typed('vmkeep datastore adopt', image.datastore)}"
    return [
        Remark(source=one.source, kind="unused", why=f"increment {one.manifest.number} of image {image.number}: {how}")
        for one in branch.chain
    ]


def _merged(branch: Branch) -> list[Remark]:
    """Remarks about what is left of a chain while the installation that has merged it deletes it."""
    return [
        Remark(
            source=one.source,
            kind="unused",
            why=f"increment {one.manifest.number} of image {one.manifest.image}: it was merged into a later full",
            image=one.manifest.image,
        )
        for one in branch.chain
    ]


def _of_other(image: Image, there: Image) -> list[Remark]:
    """Remarks about what was found of an image that the catalog knows in another datastore."""
    known = {increment.source for increment in there.increments}
    return [
        Remark(
            source=one.source,
            kind="unused",
            why=f"increment {one.id}, VM {image.vm.name}: not among those of image {there.number} in datastore "
            f"{there.datastore}",
        )
        for one in image.increments
        if one.source not in known
    ]


def _carry_out(place: Workplace, plan: _Plan, busy: list[str], ctx: Context) -> _Plan:
    """Write down what was planned, VM by VM, each with its lock: a backup that is just between its datastore and the
    catalog must find its image as it left it. What could not be done is `busy`.
    """
    done = replace(plan, added=[], changed=[])
    expected = {one.uuid: one.increments for one in plan.there}
    due: list[Change | Image] = [*plan.changed, *plan.added]
    for work in due:
        ctx.check()
        image = work.before if isinstance(work, Change) else work
        try:
            with lock.vm_run(place.state, image.vm, "a rebuild of the catalog"):
                _require_same(plan, image.vm, expected)
                if isinstance(work, Change):
                    _apply(place, plan, work, done)
                    expected[image.uuid] = done.changed[-1].after.increments
                elif (number := images.add(place.catalog, work)) is not None:
                    done.added.append(replace(work, number=number))
                    expected[image.uuid] = work.increments
        except Busy as error:
            busy.append(f"image {image.number or image.uuid}: {error.message}")
    done.kept = plan.kept
    return done


def _require_same(plan: _Plan, vm: VM, expected: Mapping[str, Sequence[Increment]]) -> None:
    """Busy where the catalog has something else of the VM than it had before the datastore was listed."""
    # Of all VMs: an image that cannot be read is left out then, and it is what is to be replaced.
    now = [one for one in images.where(plan.catalog) if (one.vm.uuid, one.datastore) == (vm.uuid, plan.name)]
    if any(one.uuid not in expected or _ids(one.increments) != _ids(expected[one.uuid]) for one in now):
        raise Busy(f"backups of VM {vm.name} were recorded meanwhile", "Run it again.")


def _ids(increments: Sequence[Increment]) -> list[tuple[int, SourceRef]]:
    return [(one.id, one.source) for one in increments]


def _apply(place: Workplace, plan: _Plan, change: Change, done: _Plan) -> None:
    before = change.before
    with ExitStack() as stack:
        stack.enter_context(lock.image_exclusive(place.state, before, "the catalog is being rebuilt"))
        if plan.kept is None:
            plan.kept = place.catalog.keep(f"before-rebuild-{datetime.now().astimezone():%Y%m%dT%H%M%S}")
        if change.added or change.merged:
            own = place.installation
            stay = {one.id for one in change.after.increments} & {one.id for one in before.increments}
            healed = bool(change.back) and not {*corrections.lost(place.catalog, before)} - {*change.back}
            corrections.replace(place.catalog, before, change.after, own, keep=stay, healed=healed)
        elif change.moved:
            moved = {one.id: one.source for one in change.after.increments if one.id in change.moved}
            corrections.move(place.catalog, before, moved)
        image = images.find(place.catalog, before.uuid)
        marked = set(corrections.lost(place.catalog, image))
        gone = (marked | set(change.lost)) - set(change.back)
        if gone != marked or change.back:
            why = {number: _gone(image, number) for number in gone if number in {one.id for one in image.increments}}
            corrections.mark(place.catalog, image, why)
    done.changed.append(replace(change, after=images.find(place.catalog, before.uuid)))


def _gone(image: Image, number: int) -> str:
    return f"increment {number} of image {image.number} is no longer in datastore {image.datastore}, or a part of it"


def _known(catalog: Catalog, name: str) -> dict[SourceRef, str]:
    """Every source that the catalog has in this datastore, and what it is."""
    found = {
        increment.source: _ELSEWHERE
        if image.state == "absent"
        else f"increment {increment.id} of image {image.number}, VM {image.vm.name}"
        for image in images.where(catalog)
        if image.datastore == name
        for increment in image.increments
    }
    for owner in flattens.owners(catalog):
        for left in flattens.leftovers(catalog, owner):
            if left.datastore == name:
                found[left.source] = _LEFT
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A source that the catalog has and its datastore has not, or not whole; `what` it is, in words."""

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
    """The catalog held against the datastores. `errors` are of those that could not be asked, by name.

    `superseded` are sources that are gone since a later full stands for them, which the catalog does not know.
    """

    datastores: tuple[str, ...]
    missing: tuple[Missing, ...]
    superseded: tuple[Missing, ...]
    unused: tuple[Unused, ...]
    errors: Mapping[str, BackupError]


def check(place: Workplace, name: str | None = None, *, progress: Progress | None = None) -> Checked:
    """Hold the catalog against one datastore, or against all. Nothing is changed, and no data are read."""
    names = [place.config.datastore(name)] if name is not None else list(place.config.datastores)
    missing: list[Missing] = []
    superseded: list[Missing] = []
    unused: list[Unused] = []
    errors: dict[str, BackupError] = {}
    with place.context(progress) as ctx:
        for one in names:
            ctx.progress.phase(f"look into {one}")
            before = _known(place.catalog_if_any, one)
            try:
                store = place.datastore(one)
                listed = {found.source: found for found in store.sources(ctx)}
                # Twice, since backups are recorded and deleted meanwhile.
                after = _known(place.catalog_if_any, one)
                missed, merged, moved = _missed(place, store, one, listed, ctx)
            except BackupError as error:
                ctx.check()
                errors[one] = error
                continue
            known = {*before, *after}
            missing += [row for row in missed if row.source in before and row.source in after]
            superseded += [row for row in merged if row.source in before and row.source in after]
            unused += [
                _unused(one, found) for source, found in listed.items() if source not in known and source not in moved
            ]
    return Checked(
        datastores=tuple(names),
        missing=tuple(missing),
        superseded=tuple(superseded),
        unused=tuple(unused),
        errors=errors,
    )


def _missed(
    place: Workplace, store: Datastore, name: str, listed: Mapping[SourceRef, Listed], ctx: Context
) -> tuple[list[Missing], list[Missing], set[SourceRef]]:
    """What the catalog has of a datastore and is not there, or not whole; what went into a later full; and the sources
    that stand for others under a new token.
    """
    missing: list[Missing] = []
    merged: list[Missing] = []
    moved: set[SourceRef] = set()
    listing = list(listed.values())
    for image in images.where(place.catalog_if_any):
        if image.datastore != name or image.state == "absent" or _all_as_known(image, listed):
            continue
        known = needed.accounted(place.catalog_if_any, image.vm, name, listing)
        found = standing.look(store, image, listing, known, ctx, whole=True)
        moved.update(found.moved.values())
        for row in image.increments:
            what = f"increment {row.id} of image {image.number}, VM {image.vm.name}"
            one = Missing(datastore=name, source=row.source, what=what)
            if row in found.superseded:
                merged.append(one)
            elif row.id in found.lost:
                missing.append(one)
            elif row.id in found.torn:
                missing.append(replace(one, what=f"a part of {what}"))
    return missing, merged, moved


def _all_as_known(image: Image, listed: Mapping[SourceRef, Listed]) -> bool:
    """Whether a listing has every source of an image, none with another size than it had."""
    return all(one.source in listed and listed[one.source].size in (None, one.size) for one in image.increments)


def _unused(datastore: str, found: Listed) -> Unused:
    return Unused(datastore=datastore, source=found.source, labels=found.labels)
