"""Retention: what KEEP_LAST lets go, after a backup and by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from backupcore import chain
from backupcore.context import Progress
from backupcore.errors import BackupError, Cancelled, Locked, TargetUnavailable
from backupcore.model import VM
from backupcore.typed import typed
from vmkeep import deletion, flatten, settings
from vmkeep.catalog import chains, flattens, holds, images
from vmkeep.workplace import Workplace

__all__ = ["Action", "Plan", "apply", "plan", "prune"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """What retention does, or would do, to one image, and why. `what` is ``keep`` where a rule holds it back.

    `to` is the increment that a flatten ends with. `done` is true once it has happened; `error` says why it has not,
    or, of what stays, what somebody should do about it ("" where that is as somebody wanted it).
    """

    what: Literal["flatten", "remove", "keep"]
    image: int
    why: str
    to: int | None = None
    done: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Retention of one VM in one datastore. `unknown` says why its settings are not known; then nothing goes.

    `away` is why its datastore could not be asked; then nothing was tried.
    """

    vm: VM
    datastore: str
    actions: tuple[Action, ...]
    unknown: str = ""
    away: BackupError | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was to go and has not, without anybody having wanted that."""
        return tuple(
            f"retention, image {one.image}: {f'stays: {one.why}. ' if one.what == 'keep' else ''}{one.error}"
            for one in self.actions
            if one.error
        )


def _now() -> datetime:
    return datetime.now(UTC)


def plan(
    place: Workplace, *, vm: VM | None = None, datastore: str | None = None, clock: Callable[[], datetime] = _now
) -> list[Plan]:
    """What retention would do now, for all VMs that have images or for one. Touches nothing. `clock` tells it.

    What a datastore is known not to delete as yet stays.
    """
    now = clock()
    held = holds.active(place.catalog_if_any, now)
    found = chains.chains(
        place.catalog_if_any,
        place.installation_if_any,
        now=now,
        vm=vm.uuid if vm else None,
        datastore=datastore,
    )
    known: dict[str, Mapping[str, str] | BackupError] = {}
    for one in found:
        if one.vm.uuid not in known:
            known[one.vm.uuid] = _settings(place, one.vm)
    return [_put_off(_plan(one, known[one.vm.uuid]), held) for one in found]


def _put_off(due: Plan, held: Mapping[int, holds.Hold]) -> Plan:
    """The same, without what ends in a delete that the datastore is known to refuse."""
    return replace(
        due,
        actions=tuple(
            _kept(one, held[one.image]) if one.what != "keep" and one.image in held else one for one in due.actions
        ),
    )


def _kept(action: Action, held: holds.Hold) -> Action:
    return replace(action, what="keep", to=None, why=f"{action.why}, but {holds.words(held)}")


def _settings(place: Workplace, vm: VM) -> Mapping[str, str] | BackupError:
    try:
        return settings.effective(place.hypervisor.settings(vm), place.config.defaults, vm.name)
    except BackupError as error:
        # Of a VM that is not there any more the backups may be all that is left: no default may let them go.
        return error


def _plan(found: chains.Chains, known: Mapping[str, str] | BackupError) -> Plan:
    if isinstance(known, BackupError):
        return Plan(vm=found.vm, datastore=found.datastore, actions=(), unknown=known.message)
    due = chain.retention(found.chains, known)
    actions = [Action(what="remove", image=one.number, why=one.why) for one in due.removals]
    if due.flattening:
        one = due.flattening
        actions.append(Action(what="flatten", image=one.number, to=one.to, why=one.why))
    by_number = {one.number: one for one in found.chains}
    actions += [
        Action(
            what="keep",
            image=one.number,
            why=one.why,
            error="" if one.expected else _hint(by_number[one.number], found),
        )
        for one in due.passed
    ]
    return Plan(vm=found.vm, datastore=found.datastore, actions=tuple(actions))


def _hint(held: chain.Chain, found: chains.Chains) -> str:
    """What to do about an image that stays without anybody having wanted that."""
    pinned = f"to keep it: {typed('vmkeep image pin', held.number)}"
    if not held.ours:
        if not held.owner:
            return f"If nobody needs it: {typed('vmkeep image delete', held.number)}; {pinned}"
        whose = typed("vmkeep catalog take-over", found.datastore, "--from", held.owner)
        return f"If that installation is gone, take its backups over: {whose}; {pinned}"
    if held.ahead:
        # With a clock that is behind now, good backups are dated ahead, and are all that there is.
        if all(one.ahead for one in found.chains if one.order < held.order):
            return "Is the host's clock right now (date)? No backup before it has a date that has passed, either."
        then = "If the host's clock is right now (date), it was wrong then. To let the image go"
        return f"{then}: {typed('vmkeep image delete', held.number)}; {pinned}"
    return f"To let it go: {typed('vmkeep image delete', held.number)}; {pinned}"


def apply(place: Workplace, due: Plan, *, progress: Progress | None = None) -> Plan:
    """Do what a plan says. What fails is noted and the rest goes on: every action stands for itself."""
    return replace(due, actions=tuple(_apply(place, one, progress) for one in due.actions))


def _apply(place: Workplace, action: Action, progress: Progress | None) -> Action:
    try:
        if action.what != "keep" and (held := _locked(place, action)):
            return _kept(action, held)
        if action.what == "flatten":
            done = flatten.flatten(place, str(action.image), to=action.to, held=True, progress=progress)
            return replace(action, done=True, error="; ".join(done.warnings))
        if action.what == "remove":
            deletion.delete(place, str(action.image), progress=progress)
            return replace(action, done=True)
    except Cancelled:
        raise  # the user wants the rest to stop as well
    except Locked as error:
        kind = holds.LOCK if error.until else holds.POLICY
        return _kept(action, holds.hold(place.catalog, action.image, error.until, kind, _now()))
    except BackupError as error:
        return replace(action, error=error.in_full)
    return action


def _locked(place: Workplace, action: Action) -> holds.Hold | None:
    """What keeps the sources that this action would delete in the end; it is noted for the next time.

    A flatten that is begun before would leave one more full each time, and delete nothing.
    """
    now = _now()
    if known := holds.active(place.catalog, now).get(action.image):  # by what was done just before
        return known
    [image] = images.where(place.catalog, number=action.image)
    going = [one.source for one in image.increments if action.to is None or one.id <= action.to]
    with place.context() as ctx:
        found = place.datastore(image.datastore).locks(going, ctx)
    if not found:
        return None
    dates = [until for until in found.values() if until]
    until = max(dates) if len(dates) == len(found) else None
    return holds.hold(place.catalog, action.image, until, holds.LOCK, now)


def prune(
    place: Workplace, vm: str | None = None, *, dry_run: bool = False, progress: Progress | None = None
) -> tuple[list[Plan], list[str]]:
    """Apply retention by hand, to all VMs or to one (a name or a UUID); with `dry_run` say what it would do.

    Flattens that were interrupted are finished first, and what earlier ones have left is deleted. Returns what was
    done, and what went wrong.
    """
    one = place.hypervisor.find(vm).vm if vm is not None else None
    if dry_run:
        plans = plan(place, vm=one)
        return plans, [warning for due in plans for warning in due.warnings]
    warnings = []
    for number in flattens.unfinished(place.catalog):
        for image in images.where(place.catalog, number=number):
            if place.installation.owns(image) and (one is None or image.vm.uuid == one.uuid):
                try:
                    flatten.finish(place, image)
                except BackupError as error:
                    warnings.append(f"image {number}: {error.in_full}")
    for owner in flattens.owners(place.catalog):
        if one is None or owner == one.uuid:
            warnings += _delete_leftovers(place, owner)
    away = _away(place, plan(place, vm=one))
    plans = []
    for due in plan(place, vm=one):
        if due.datastore in away:
            plans.append(replace(due, actions=(), away=away[due.datastore]))
        else:
            plans.append(apply(place, due, progress=progress))
    warnings += [f"retention in {name}: {error.in_full}" for name, error in away.items()]
    return plans, [*warnings, *(warning for due in plans for warning in due.warnings)]


def _away(place: Workplace, plans: Sequence[Plan]) -> dict[str, BackupError]:
    """Of the datastores in which something is to go, those that are not there, or not the place that is known."""
    found: dict[str, BackupError] = {}
    for name in {due.datastore for due in plans if any(one.what != "keep" for one in due.actions)}:
        try:
            with place.context() as ctx:
                place.same_place(name).look(ctx)
        except TargetUnavailable as error:
            found[name] = error
        except BackupError:
            continue  # what is tried there says it
    return found


def after(
    place: Workplace, vm: VM, datastore: str, *, progress: Progress | None = None
) -> tuple[list[Plan], list[str]]:
    """Retention after a backup, which is done in any case: what went in that datastore, and what went wrong."""
    warnings: list[str] = []
    try:
        warnings += _delete_leftovers(place, vm.uuid, datastore)
        plans = [apply(place, due, progress=progress) for due in plan(place, vm=vm, datastore=datastore)]
    except BackupError as error:
        return [], [*warnings, f"retention: {error.in_full}"]
    return plans, [*warnings, *(warning for due in plans for warning in due.warnings)]


def _delete_leftovers(place: Workplace, vm: str, datastore: str | None = None) -> list[str]:
    if not any(datastore in (None, one.datastore) for one in flattens.leftovers(place.catalog, vm)):
        return []
    with place.context() as ctx:
        return flatten.delete_leftovers(place, vm, ctx, place.datastore(datastore) if datastore else None)
