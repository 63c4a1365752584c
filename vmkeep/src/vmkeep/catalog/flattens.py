"""The journal of flattens: what has begun, and the sources that are still to be deleted."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sqlalchemy import delete, func, insert, select, update

from backupcore.errors import IntegrityError, UnsupportedOperation
from backupcore.model import Image, SourceRef
from vmkeep.catalog import images, points, schema
from vmkeep.catalog.database import Catalog

if TYPE_CHECKING:
    from backupcore.flatten import Flattened

__all__ = ["Leftover", "begin", "begun", "drop", "leftovers", "owners", "record", "room", "undo", "unfinished"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """A source that nothing refers to any more, and that is still to be deleted."""

    datastore: str
    source: SourceRef


def begin(catalog: Catalog, image: Image, to: int) -> None:
    """Write down that a flatten begins; the image is not built on meanwhile. UnsupportedOperation if it cannot be."""
    table = schema.images.c
    with catalog.writing() as connection:
        row = connection.execute(select(schema.images).where(table.number == image.number)).one()
        if row.pinned:
            raise UnsupportedOperation(
                f"image {image.number} is pinned", f"Unpin it first: vmkeep image unpin {image.number}"
            )
        if row.state not in ("open", "closed"):
            raise UnsupportedOperation(f"image {image.number} is {row.state}", "Verify it, or restore what is left.")
        connection.execute(
            insert(schema.flattens).values(
                image=image.number, to=to, state=row.state, started=datetime.now(UTC).isoformat()
            )
        )
        connection.execute(update(schema.images).where(table.number == image.number).values(state="flattening"))


def begun(catalog: Catalog, image: Image) -> str | None:
    """What the state of this image was before its flatten, if one has begun and was neither recorded nor undone."""
    with catalog.reading() as connection:
        query = select(schema.flattens.c.state).where(schema.flattens.c.image == image.number)
        return connection.execute(query).scalar()


def undo(catalog: Catalog, image: Image) -> None:
    """Let the image be what it was before its flatten began."""
    table = schema.flattens.c
    with catalog.writing() as connection:
        row = connection.execute(select(schema.flattens).where(table.image == image.number)).one_or_none()
        if row is not None:
            images_ = schema.images.c
            connection.execute(update(schema.images).where(images_.number == image.number).values(state=row.state))
            connection.execute(delete(schema.flattens).where(table.image == image.number))


def record(catalog: Catalog, image: Image, done: Flattened) -> None:
    """Put the new full in the place of what it was made from, all or nothing; the old sources are leftovers then."""
    rows = schema.increments.c
    old = {increment.id: increment for increment in done.replaces}
    with catalog.writing() as connection:
        begun_ = connection.execute(
            select(schema.flattens).where(schema.flattens.c.image == image.number)
        ).one_or_none()
        there = connection.execute(
            select(rows.id, rows.source, rows.frozen_seconds)
            .where(rows.image == image.number, rows.id <= done.increment.id)
            .order_by(rows.id)
        ).all()
        if begun_ is None or [(row.id, row.source) for row in there] != [
            (increment.id, increment.source.token) for increment in done.replaces
        ]:
            raise IntegrityError(f"image {image.number} changed while it was flattened")
        connection.execute(delete(schema.increments).where(rows.image == image.number, rows.id.in_(list(old))))
        connection.execute(
            insert(schema.increments).values(
                images.columns(image.number, done.increment)
                | {
                    "stored": done.stored,
                    "read": 0,
                    "frozen_seconds": there[-1].frozen_seconds,
                    "seconds": done.seconds,
                }
            )
        )
        points.retire(connection, image.vm, [one.point for one in done.replaces if one.point != done.increment.point])
        connection.execute(
            update(schema.images)
            .where(schema.images.c.number == image.number)
            .values(state=begun_.state, began=done.began.astimezone(UTC).isoformat())
        )
        connection.execute(delete(schema.flattens).where(schema.flattens.c.image == image.number))
        connection.execute(
            insert(schema.leftovers),
            [
                {"vm_uuid": image.vm.uuid, "datastore": image.datastore, "source": one.source.token}
                for one in reversed(done.replaces)
            ],
        )


def unfinished(catalog: Catalog) -> list[int]:
    """The numbers of the images whose flatten has begun, and was neither recorded nor undone."""
    with catalog.reading() as connection:
        return list(connection.execute(select(schema.flattens.c.image)).scalars())


def owners(catalog: Catalog) -> list[str]:
    """The UUIDs of the VMs that flattens have left something of."""
    with catalog.reading() as connection:
        return list(connection.execute(select(schema.leftovers.c.vm_uuid).distinct()).scalars())


def leftovers(catalog: Catalog, vm: str) -> list[Leftover]:
    """What flattens of this VM (UUID) have left to be deleted, in the order in which it is to go."""
    table = schema.leftovers.c
    query = select(schema.leftovers).where(table.vm_uuid == vm).order_by(table.number)
    with catalog.reading() as connection:
        return [Leftover(datastore=row.datastore, source=SourceRef(row.source)) for row in connection.execute(query)]


def drop(catalog: Catalog, gone: list[Leftover]) -> None:
    """These are deleted."""
    table = schema.leftovers.c
    with catalog.writing() as connection:
        for one in gone:
            connection.execute(
                delete(schema.leftovers).where(table.datastore == one.datastore, table.source == one.source.token)
            )


def room(catalog: Catalog, image: Image, to: int) -> int | None:
    """How many bytes the increments up to `to` have taken in their datastore; None where that is not known of all."""
    rows = schema.increments.c
    query = select(func.count(), func.count(rows.stored), func.sum(rows.stored)).where(
        rows.image == image.number, rows.id <= to
    )
    with catalog.reading() as connection:
        count, known, total = connection.execute(query).one()
    return int(total) if count == known and total is not None else None
