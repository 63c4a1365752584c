"""Pure arithmetic over images: full or increment, which increments a restore needs, and what retention lets go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from backupcore.errors import IntegrityError, NotFound
from backupcore.model import VM, BackupRun, Image, Increment, Link, Type, new_id

__all__ = [
    "AHEAD",
    "Chain",
    "Flattening",
    "Passed",
    "Removal",
    "Retention",
    "full_is_due",
    "lineage",
    "plan",
    "retention",
]

AHEAD = timedelta(days=1)
"""A date that is later than now by more than this is of a clock that was wrong; clocks of two hosts differ by less."""


def plan(
    image: Image | None,
    *,
    vm: VM,
    host: str,
    datastore: str,
    settings: Mapping[str, str],
    reset: bool = False,
    now: datetime | None = None,
    installation: str = "",
) -> BackupRun:
    """The next run of `vm` in `datastore`, where `image` is the newest that `installation` has of it there, if any.

    An increment if the image is open and MODE is INCREMENT (the default); otherwise a full in a new image, with the
    reason. Whether the increment is really possible is for the hypervisor to say. `now` is for FULL_EVERY in days.
    """
    tracked = settings.get("MODE", "INCREMENT") == "INCREMENT"
    reason = _why_full(image, tracked=tracked, reset=reset)
    if image and not reason:
        reason = full_is_due(image, settings.get("FULL_EVERY", "0"), now or datetime.now(UTC))
    points = tuple(increment.point for increment in image.increments) if image else ()
    if image is None or reason:
        return BackupRun(
            id=new_id(),
            vm=vm,
            host=host,
            datastore=datastore,
            image=new_id(),
            number=0,
            point=new_id(),
            type=Type.FULL,
            reason=reason,
            spent=points,
            settings=settings,
            tracked=tracked,
            installation=installation,
        )
    last = image.increments[-1]
    return BackupRun(
        id=new_id(),
        vm=vm,
        host=host,
        datastore=datastore,
        image=image.uuid,
        number=last.id + 1,
        point=new_id(),
        type=Type.INCREMENT,
        parent=Link(point=last.point, digest=last.digest, disks=last.disks),
        builds_on=tuple(increment.source for increment in image.increments),
        spent=points[:-1],
        settings=settings,
        installation=installation,
    )


def _why_full(image: Image | None, *, tracked: bool, reset: bool) -> str:
    if image is None or not image.increments:
        return "first backup of this VM in this datastore"
    if not tracked:
        return "MODE=FULL"
    if reset:
        return "reset asked for"
    if image.state != "open":
        return image.why_closed or f"image {image.number} is {image.state}"
    return ""


def full_is_due(image: Image, every: str, now: datetime) -> str:
    """Why FULL_EVERY asks for a new image, or "". `every` is a number of increments, or of days (``30d``); 0: never.

    Days are those of the calendar, in UTC: a nightly run that is a minute early must not wait for the next night. Of an
    image that is dated ahead of `now` nobody knows how old it is, since a clock was wrong: a full is due.
    """
    count = int(every.removesuffix("d") or 0)
    if not count or not image.increments:
        return ""
    if every.endswith("d"):
        began = image.began or image.increments[0].date
        if began > now + AHEAD:
            date = began.astimezone(UTC).date()
            return f"FULL_EVERY={every}: image {image.number} is dated {date}, ahead of the clock"
        days = (now.astimezone(UTC).date() - began.astimezone(UTC).date()).days
        return f"FULL_EVERY={every}: image {image.number} is {days} days old" if days >= count else ""
    taken = image.increments[-1].id + 1  # IDs are never renumbered, so those that were flattened count as well
    return f"FULL_EVERY={every}: image {image.number} has had {taken} increments" if taken >= count else ""


def lineage(image: Image, number: int | None = None) -> tuple[Increment, ...]:
    """The increments that make up increment `number` of `image` (None: its last), oldest first; the first is a full.

    NotFound if there is no such increment; IntegrityError if the chain has a gap.
    """
    by_id = {increment.id: increment for increment in image.increments}
    wanted = image.increments[-1].id if number is None and image.increments else number
    if wanted is None or wanted not in by_id:
        ids = ", ".join(str(i) for i in by_id) or "none"
        raise NotFound(f"image {image.number} has no increment {str(wanted)[:40]}", f"It has: {ids}.")
    chain = [by_id[wanted]]
    while chain[-1].type is not Type.FULL:
        parent = by_id.get(chain[-1].pid)
        if parent is None or parent.id >= chain[-1].id:
            raise IntegrityError(
                f"image {image.number}: increment {chain[-1].id} builds on {chain[-1].pid}, which is not there",
                "Restore an older increment, and start a new image with: vmkeep backup --reset",
            )
        chain.append(parent)
    return tuple(reversed(chain))


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """What retention looks at of one image: `ids` are those of its increments, oldest first.

    `ours` is false where another installation, or nobody that is known, has written it; `owner` says who. `order` is
    its place in the order in which images were recorded, where its number is not: one that was found in a datastore has
    a later number than younger ones. `ahead` is the date of a point that lies in the future, "" where there is none.
    """

    number: int
    state: str
    pinned: bool
    ours: bool
    ids: tuple[int, ...]
    order: int = 0
    owner: str = ""
    ahead: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """An image that goes."""

    number: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Flattening:
    """An image whose increments up to the ID `to` become one full."""

    number: int
    to: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """An image that would go or be flattened, and why it stays as it is.

    `expected` is whether that is as somebody wanted it, or will pass: nobody has to see to it.
    """

    number: int
    why: str
    expected: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What retention does to the images of one VM in one datastore: `removals` oldest first."""

    flattening: Flattening | None = None
    removals: tuple[Removal, ...] = ()
    passed: tuple[Passed, ...] = ()


def retention(chains: Sequence[Chain], settings: Mapping[str, str]) -> Retention:
    """What KEEP_LAST and KEEP_CHAINS let go of the images of one VM in one datastore.

    - MODE=FULL keeps the last KEEP_LAST images.
    - MODE=INCREMENT keeps KEEP_LAST increments of the open image: the older ones are flattened into the oldest that is
      kept. Of the closed images it keeps KEEP_CHAINS, or as many as KEEP_LAST says where that is not set.
    - 0 keeps all. Images that are pinned, damaged, absent, another installation's, or being flattened stay, and do not
      count.
    - Order is that of the record, never of a date. An image with a point that is dated ahead stays, and does not count.
      Within an image the increments have their own order, whatever their dates are.
    - The newest image stays whatever the numbers. Where it is not open, a delete of it has begun or a flatten was
      interrupted, and nothing goes: what is left of it may not be restorable.
    """
    keep = int(settings.get("KEEP_LAST") or 0)
    closed = keep if settings.get("KEEP_CHAINS", "") == "" else int(settings["KEEP_CHAINS"])
    full = settings.get("MODE") == "FULL"
    by_age = sorted(
        (chain for chain in chains if chain.ids), key=lambda chain: (chain.state == "open", chain.order, chain.number)
    )
    if not by_age or not (keep if full else keep or closed):
        return Retention()
    *others, newest = by_age
    # How many images stay beside the newest; one that is dated ahead does not count for any of them.
    limit = (keep if newest.ahead else keep - 1) if full else closed
    if newest.state != "open":
        why = f"it is {newest.state}, and may be all that is left: take a backup first"
        return Retention(passed=(Passed(number=newest.number, why=why, expected=newest.state != "damaged"),))
    flattening: Flattening | None = None
    passed: list[Passed] = []
    if keep and not full and len(newest.ids) > keep:
        why = f"KEEP_LAST={keep}: it has {len(newest.ids)} increments"
        if held := _held(newest):
            passed.append(Passed(number=newest.number, why=f"{why}, but {held.why}", expected=held.expected))
        else:
            flattening = Flattening(number=newest.number, to=newest.ids[-keep], why=why)
    counted = [chain for chain in others if not _held(chain) and not chain.ahead]
    going = counted[: max(0, len(counted) - limit)] if full or closed else []
    setting = "KEEP_LAST" if full or settings.get("KEEP_CHAINS", "") == "" else "KEEP_CHAINS"
    what = f"{keep} newer images stay" if full else f"{closed} newer closed images stay"
    why = f"{setting}={keep if full else closed}: {what}"
    removals = tuple(Removal(number=chain.number, why=why) for chain in going)
    if full or closed:
        first_kept = by_age.index(next(iter(counted[len(going) :]), newest))
        for at, chain in enumerate(others):
            held = _held(chain)
            if held and at < first_kept and len(counted) >= limit:
                passed.append(Passed(number=chain.number, why=held.why, expected=held.expected))
            elif chain.ahead and not held:
                why_ahead = f"a backup in it is dated {chain.ahead}, ahead of the clock"
                passed.append(Passed(number=chain.number, why=why_ahead))
    return Retention(flattening=flattening, removals=removals, passed=tuple(passed))


@dataclass(frozen=True, slots=True)
class _Held:
    """Why retention does not touch an image, and whether that is as somebody wanted it."""

    why: str
    expected: bool = False


def _held(chain: Chain) -> _Held | None:
    if chain.pinned:
        return _Held("it is pinned", expected=True)
    if not chain.ours:
        return _Held(f"{f'installation {chain.owner}' if chain.owner else 'nobody that is known'} has written it")
    if chain.state not in ("open", "closed"):
        return _Held(f"it is {chain.state}", expected=chain.state in ("flattening", "absent"))
    return None
