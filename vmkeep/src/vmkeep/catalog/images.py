"""Images and their increments in the catalog."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, Connection, delete, func, insert, select, update

from backupcore.errors import ConfigError, IntegrityError, NotFound
from backupcore.model import VM, Disk, Image, Increment, SourceRef, Type
from vmkeep.catalog import points, schema
from vmkeep.catalog.database import Catalog

if TYPE_CHECKING:
    from backupcore.session import Recorded

__all__ = [
    "Listed",
    "add",
    "close",
    "columns",
    "find",
    "last_dates",
    "listed",
    "mark",
    "newest",
    "pin",
    "record",
    "remove",
    "tokens",
    "where",
]

_PREFIX = 4  # hex digits: fewer would too easily be meant as a number


def _increment(row: Any) -> Increment:
    return Increment(
        id=row.id,
        pid=row.pid,
        type=Type(row.type),
        point=row.point,
        source=SourceRef(row.source),
        size=row.size,
        date=datetime.fromisoformat(row.date),
        consistency=row.consistency,
        reason=row.reason,
        digest=row.digest,
        disks=tuple(Disk(**disk) for disk in json.loads(row.disks)),
    )


def _load(connection: Connection, *conditions: ColumnElement[bool]) -> list[Image]:
    chains: dict[int, list[Increment]] = {}
    rows = connection.execute(select(schema.images).where(*conditions).order_by(schema.images.c.number)).all()
    numbers = [row.number for row in rows]
    of_these = select(schema.increments).order_by(schema.increments.c.image, schema.increments.c.id)
    if conditions:
        of_these = of_these.where(schema.increments.c.image.in_(numbers))
    for row in connection.execute(of_these):
        chains.setdefault(row.image, []).append(_increment(row))
    return [_image(row, tuple(chains.get(row.number, ()))) for row in rows]


def _image(row: Any, increments: tuple[Increment, ...]) -> Image:
    return Image(
        uuid=row.uuid,
        number=row.number,
        vm=VM(uuid=row.vm_uuid, name=row.vm_name),
        datastore=row.datastore,
        state=row.state,
        increments=increments,
        pinned=row.pinned,
        why_closed=row.why_closed or "",
        host=row.host or "",
        began=datetime.fromisoformat(row.began) if row.began else None,
    )


def where(catalog: Catalog, *, vm: str | None = None, number: int | None = None) -> list[Image]:
    """Every image, by number; with `vm` (a UUID or a name) only those of that VM, with `number` only that one."""
    table = schema.images.c
    conditions: list[ColumnElement[bool]] = []
    if vm is not None:
        conditions.append((table.vm_uuid == vm) | (table.vm_name == vm))
    if number is not None:
        conditions.append(table.number == number)
    with catalog.reading() as connection:
        return _load(connection, *conditions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """An image in a list: itself without its increments, how many there are, their bytes, the first and last date."""

    image: Image
    count: int
    size: int
    first: datetime | None
    last: datetime | None


def listed(catalog: Catalog, *, vm: str | None = None) -> list[Listed]:
    """Every image, by number; with `vm` (a UUID or a name) only those of that VM. Quick, however many increments."""
    table, rows = schema.images.c, schema.increments.c
    query = select(schema.images).order_by(table.number)
    if vm is not None:
        query = query.where((table.vm_uuid == vm) | (table.vm_name == vm))
    # Dates are text in UTC, all of one form, so they sort as dates do.
    sums = select(rows.image, func.count(), func.sum(rows.size), func.min(rows.date), func.max(rows.date))
    with catalog.reading() as connection:
        known = {number: rest for number, *rest in connection.execute(sums.group_by(rows.image))}
        found = connection.execute(query).all()
    made = []
    for row in found:
        count, size, first, last = known.get(row.number, (0, 0, None, None))
        made.append(
            Listed(
                image=_image(row, ()),
                count=count,
                size=size,
                first=datetime.fromisoformat(first) if first else None,
                last=datetime.fromisoformat(last) if last else None,
            )
        )
    return made


def newest(catalog: Catalog, vm: VM, datastore: str) -> Image | None:
    """The newest image of a VM in a datastore: the open one, else the one that began last."""
    table = schema.images.c
    # Not by number alone: a rebuild gives old images new numbers.
    order = (table.state == "open").desc(), table.began.desc(), table.number.desc()
    with catalog.reading() as connection:
        number = connection.execute(
            select(table.number).where(table.vm_uuid == vm.uuid, table.datastore == datastore).order_by(*order).limit(1)
        ).scalar()
        return next(iter(_load(connection, table.number == number)), None) if number is not None else None


def find(catalog: Catalog, reference: str) -> Image:
    """The image of that number, UUID (with or without dashes), or unique prefix of one. NotFound otherwise."""
    table = schema.images.c
    digits = reference.replace("-", "").lower()
    with catalog.reading() as connection:
        if reference.isascii() and reference.isdigit() and len(reference) < 19:
            found = _load(connection, table.number == int(reference))
            if found:
                return found[0]
        if len(digits) >= _PREFIX and set(digits) <= set("0123456789abcdef"):
            found = _load(connection, table.uuid.startswith(digits, autoescape=True))
            if len(found) == 1:
                return found[0]
            if found:
                numbers = ", ".join(str(image.number) for image in found)
                raise ConfigError(f"{reference!r} could be any of the images {numbers}", "Give more digits.")
        known = connection.execute(select(table.number).order_by(table.number.desc()).limit(5)).scalars().all()
    newest_known = ", ".join(str(number) for number in known) or "none"
    raise NotFound(f"no image {reference!r:.60}", f"The newest are: {newest_known}. See: vmkeep image list")


def record(connection: Connection, recorded: Recorded) -> int:
    """Write one increment down and return its image's number. A new image closes the one that was open before it."""
    run, increment = recorded.run, recorded.increment
    table = schema.images.c
    row = connection.execute(select(schema.images).where(table.uuid == run.image)).one_or_none()
    if row is None:
        if increment.type is not Type.FULL:
            raise IntegrityError(f"image {run.image} is not in the catalog any more; the increment has no parent")
        connection.execute(
            update(schema.images)
            .where(table.vm_uuid == run.vm.uuid, table.datastore == run.datastore, table.state == "open")
            .values(state="closed")
        )
        key = connection.execute(
            insert(schema.images).values(
                uuid=run.image,
                vm_uuid=run.vm.uuid,
                vm_name=run.vm.name,
                datastore=run.datastore,
                state="open",
                pinned=False,
                host=run.host,
                began=increment.date.astimezone(UTC).isoformat(),
            )
        ).inserted_primary_key
        number = int(key[0]) if key else 0
    else:
        number = int(row.number)
        parent = connection.execute(
            select(schema.increments.c.point).where(
                schema.increments.c.image == number, schema.increments.c.id == increment.pid
            )
        ).scalar()
        if row.state != "open" or run.parent is None or parent != run.parent.point:
            raise IntegrityError(f"image {number} changed while an increment for it was taken")
        # A VM that was renamed is shown by its name of today.
        connection.execute(update(schema.images).where(table.number == number).values(vm_name=run.vm.name))
    connection.execute(insert(schema.increments).values(columns(number, increment) | _of_the_run(recorded)))
    connection.execute(delete(schema.retired).where(schema.retired.c.point.in_(run.spent)))
    return number


def add(catalog: Catalog, image: Image) -> int | None:
    """Write a whole image down that was found in its datastore; its number, or None if the catalog has it already."""
    with catalog.writing() as connection:
        if connection.execute(select(schema.images.c.number).where(schema.images.c.uuid == image.uuid)).first():
            return None
        key = connection.execute(
            insert(schema.images).values(
                uuid=image.uuid,
                vm_uuid=image.vm.uuid,
                vm_name=image.vm.name,
                datastore=image.datastore,
                state=image.state,
                why_closed=image.why_closed or None,
                pinned=image.pinned,
                host=image.host or None,
                began=image.began.astimezone(UTC).isoformat() if image.began else None,
            )
        ).inserted_primary_key
        number = int(key[0]) if key else 0
        # How their runs went is not in the datastore.
        of_the_run = {"stored": None, "read": 0, "frozen_seconds": 0.0, "seconds": 0.0}
        rows = [columns(number, increment) | of_the_run for increment in image.increments]
        connection.execute(insert(schema.increments), rows)
    return number


def columns(number: int, increment: Increment) -> dict[str, object]:
    """The columns of one row of the image of that number; how its run went is not among them."""
    disks = [{key.name: getattr(disk, key.name) for key in fields(Disk)} for disk in increment.disks]
    return {
        "image": number,
        "id": increment.id,
        "pid": increment.pid,
        "type": increment.type.value,
        "point": increment.point,
        "source": increment.source.token,
        "size": increment.size,
        "date": increment.date.astimezone(UTC).isoformat(),
        "consistency": increment.consistency,
        "reason": increment.reason,
        "digest": increment.digest,
        "disks": json.dumps(disks),
    }


def _of_the_run(recorded: Recorded) -> dict[str, object]:
    return {
        "stored": recorded.stored,
        "read": recorded.read,
        "frozen_seconds": recorded.frozen_seconds,
        "seconds": recorded.seconds,
    }


def remove(catalog: Catalog, image: Image) -> None:
    """Forget an image and its increments. Its points are kept as retired until the VM's next recorded run."""
    with catalog.writing() as connection:
        points.retire(connection, image.vm, [increment.point for increment in image.increments])
        connection.execute(delete(schema.flattens).where(schema.flattens.c.image == image.number))
        connection.execute(delete(schema.increments).where(schema.increments.c.image == image.number))
        connection.execute(delete(schema.images).where(schema.images.c.number == image.number))


def pin(catalog: Catalog, image: Image, *, pinned: bool) -> None:
    """Mark an image as one that neither retention nor a user deletes, or take the mark away."""
    with catalog.writing() as connection:
        connection.execute(update(schema.images).where(schema.images.c.number == image.number).values(pinned=pinned))


def close(catalog: Catalog, image: Image, why: str = "") -> None:
    """Let no further increment be added to an image; `why` becomes the reason of the full that follows."""
    with catalog.writing() as connection:
        connection.execute(
            update(schema.images)
            .where(schema.images.c.number == image.number, schema.images.c.state == "open")
            .values(state="closed", why_closed=why or None)
        )


def mark(catalog: Catalog, image: Image, *, damaged: bool) -> None:
    """Mark an image as damaged, or take the mark away; it is closed then, since its VM has begun another meanwhile."""
    before, after = (("open", "closed"), "damaged") if damaged else (("damaged",), "closed")
    with catalog.writing() as connection:
        connection.execute(
            update(schema.images)
            .where(schema.images.c.number == image.number, schema.images.c.state.in_(before))
            .values(state=after)
        )


def tokens(catalog: Catalog) -> Sequence[str]:
    """The token of every source in the catalog."""
    with catalog.reading() as connection:
        return connection.execute(select(schema.increments.c.source)).scalars().all()


def last_dates(catalog: Catalog) -> dict[str, datetime]:
    """VM UUID -> the date of its newest backup."""
    join = schema.images.join(schema.increments, schema.images.c.number == schema.increments.c.image)
    query = select(schema.images.c.vm_uuid, func.max(schema.increments.c.date)).select_from(join)
    with catalog.reading() as connection:
        rows = connection.execute(query.group_by(schema.images.c.vm_uuid)).all()
    return {uuid: datetime.fromisoformat(date) for uuid, date in rows}
