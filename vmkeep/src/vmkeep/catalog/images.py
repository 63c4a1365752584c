"""Images and their increments in the catalog."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from sqlite3 import Connection, Row
from typing import TYPE_CHECKING, Literal, get_args, get_type_hints

from backupcore.errors import ConfigError, IntegrityError, NotFound, sentences
from backupcore.model import VM, Disk, Image, Increment, SourceRef, Type
from backupcore.typed import typed
from vmkeep.catalog import points, rows
from vmkeep.catalog.database import Catalog
from vmkeep.catalog.order import place
from vmkeep.installation import Installation

if TYPE_CHECKING:
    from backupcore.session import Recorded

__all__ = [
    "Listed",
    "add",
    "close",
    "find",
    "insert",
    "last_dates",
    "listed",
    "mark",
    "newest",
    "pin",
    "record",
    "remove",
    "reopen",
    "sources",
    "tokens",
    "where",
]

log = logging.getLogger("vmkeep.catalog")

_STATES = get_args(get_type_hints(Image)["state"])
# In SQL, since a list must be quick: what `_increment` would not read, but for the rarest.
_DAMAGED = """
    SELECT DISTINCT image FROM increments
    WHERE typeof(pid) <> 'integer' OR typeof(size) <> 'integer' OR type NOT IN ('FULL', 'INCREMENT')
    OR typeof(point) <> 'text' OR typeof(source) <> 'text' OR source GLOB '*[^A-Za-z0-9._=-]*' OR source = ''
    OR typeof(disks) <> 'text' OR substr(disks, 1, 2) NOT IN ('[{', '[]') OR NOT json_valid(disks)
    OR CAST(substr(probes, 1, 1) AS TEXT) <> '{'
    OR typeof(date) <> 'text' OR date NOT GLOB '[0-9][0-9][0-9][0-9]-[01][0-9]-[0-3][0-9]T*+00:00'
"""

_PREFIX = 4  # hex digits: fewer would too easily be meant as a number
_WHOLE = 32


def _increment(row: Row) -> Increment:
    return Increment(
        id=rows.required(row, "id", int),
        pid=rows.required(row, "pid", int),
        type=Type(row["type"]),
        point=rows.required(row, "point", str),
        source=rows.source(row["source"]),
        size=rows.required(row, "size", int),
        date=rows.date(row["date"]),
        consistency=row["consistency"],
        reason=rows.required(row, "reason", str),
        digest=rows.required(row, "digest", str),
        disks=rows.disks(row),
    )


def _with_proofs(last: Increment, row: Row) -> Increment:
    """The last increment of an image, whose row it is, with what proves its disks: nothing is built on the others."""
    known = rows.proofs(row)
    return replace(last, disks=tuple(replace(disk, **known.get(disk.id, {})) for disk in last.disks))


def _load(connection: Connection, query: str, values: Mapping[str, object]) -> list[Image]:
    """The images that a query finds, with their increments."""
    return [_whole(connection, row) for row in connection.execute(query, values).fetchall()]


def _whole(connection: Connection, row: Row) -> Image:
    """An image with its increments. IntegrityError names what of it cannot be read."""
    number = row["number"]
    of_one = "SELECT * FROM increments WHERE image = ? ORDER BY id"
    increments = []
    for one in connection.execute(of_one, (number,)).fetchall():
        with rows.reading(f"image {number}, increment {one['id']!r:.20}", _hint(row)):
            increments.append(_increment(one))
            last = one
    if increments:
        with rows.reading(f"image {number}, increment {increments[-1].id}", _hint(row)):
            increments[-1] = _with_proofs(increments[-1], last)
    return _image(row, tuple(increments))


def _image(row: Row, increments: tuple[Increment, ...]) -> Image:
    with rows.reading(f"image {row['number']}", _hint(row)):
        if row["state"] not in _STATES:
            raise ValueError(f"state is {row['state']!r:.60}")
        return Image(
            uuid=rows.required(row, "uuid", str),
            number=row["number"],
            vm=VM(uuid=rows.required(row, "vm_uuid", str), name=rows.required(row, "vm_name", str)),
            datastore=rows.required(row, "datastore", str),
            state=row["state"],
            increments=increments,
            pinned=bool(row["pinned"]),
            why_closed=rows.optional(row, "why_closed"),
            host=rows.optional(row, "host"),
            began=rows.date(row["began"], "began") if row["began"] else None,
            installation=rows.optional(row, "installation"),
        )


def _hint(row: Row) -> str:
    return (
        "The backups are in the datastore, unharmed. Read it from there again: "
        f"{typed('vmkeep catalog rebuild', str(row['datastore']))} (where the image's own ID is damaged, too, move the "
        "catalog away first)."
    )


def where(catalog: Catalog, *, vm: str | None = None, number: int | None = None) -> list[Image]:
    """Every image, by number; with `vm` (a UUID) only those of that VM, with `number` only that one.

    IntegrityError if one that was asked for so is damaged in the catalog; of all, such are left out, with a warning.
    """
    query = """
        SELECT * FROM images
        WHERE (:vm IS NULL OR vm_uuid = :vm) AND (:number IS NULL OR number = :number) ORDER BY number
    """
    with catalog.reading() as connection:
        if vm is not None or number is not None:
            return _load(connection, query, {"vm": vm, "number": number})
        found = []
        for row in connection.execute(query, {"vm": None, "number": None}).fetchall():
            try:
                found.append(_whole(connection, row))
            except IntegrityError as error:
                log.warning("%s", error.in_full)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """An image in a list: itself without its increments, their number, their bytes, the first's and the last's date."""

    image: Image
    count: int
    size: int
    first: datetime | None
    last: datetime | None


def listed(catalog: Catalog, *, vm: str | None = None) -> list[Listed]:
    """Every image, by number; with `vm` (a UUID or a name) only those of that VM. Quick, however many increments."""
    query = "SELECT * FROM images WHERE :vm IS NULL OR vm_uuid = :vm OR vm_name = :vm ORDER BY number"
    sums = """
        SELECT of_one.image, count, bytes, first.date, last.date
        FROM (SELECT image, count(*) count, sum(size) bytes, min(id) low, max(id) high FROM increments GROUP BY image)
            of_one
        JOIN increments first ON first.image = of_one.image AND first.id = low
        JOIN increments last ON last.image = of_one.image AND last.id = high
    """
    with catalog.reading() as connection:
        known = {number: rest for number, *rest in connection.execute(sums)}
        found = connection.execute(query, {"vm": vm}).fetchall()
        damaged = {row["image"] for row in connection.execute(_DAMAGED)}
    made = []
    for row in found:
        count, size, first, last = known.get(row["number"], (0, 0, None, None))
        try:
            image, dates = _image(row, ()), [rows.date(one) if one else None for one in (first, last)]
        except (IntegrityError, ValueError):
            image, dates = _what_is_left(row), [None, None]
        if row["number"] in damaged:
            image = replace(image, state="damaged")
        made.append(Listed(image=image, count=count, size=int(size or 0), first=dates[0], last=dates[1]))
    return made


def _what_is_left(row: Row) -> Image:
    """An image whose row is damaged, for a list."""
    return Image(
        uuid=_shown(row["uuid"]),
        number=row["number"],
        vm=VM(uuid=_shown(row["vm_uuid"]), name=_shown(row["vm_name"])),
        datastore=_shown(row["datastore"]),
        state="damaged",
        increments=(),
        pinned=bool(row["pinned"]),
    )


def _shown(value: object) -> str:
    return value if isinstance(value, str) else "?"


def newest(catalog: Catalog, vm: VM, datastore: str, own: Installation) -> Image | None:
    """The newest image that `own` has of a VM in a datastore: the open one, else the one that was recorded last."""
    # Not by number: a rebuild gives old images new numbers. Nor by date: a host's clock may have been wrong.
    query = """
        SELECT * FROM images WHERE vm_uuid = :vm AND datastore = :datastore
        AND CASE WHEN installation IS NULL THEN host = :host ELSE installation = :own END
        ORDER BY state = 'open' DESC, sequence DESC, number DESC LIMIT 1
    """
    chosen = {"vm": vm.uuid, "datastore": datastore, "own": own.id, "host": own.host}
    with catalog.reading() as connection:
        return next(iter(_load(connection, query, chosen)), None)


def find(catalog: Catalog, reference: str) -> Image:
    """The image of that number, UUID (with or without dashes), or unique prefix of one. NotFound otherwise.

    Digits alone are a number, or a whole UUID: as the beginning of one they would hit an image that nobody has meant.
    """
    text = reference.lower()
    digits = text.replace("-", "")
    with catalog.reading() as connection:
        if reference.isascii() and reference.isdigit() and len(reference) < _WHOLE:
            # No zero in front: whoever writes one does not mean a number.
            if not reference.startswith("0") and len(reference) < 19:
                found = _load(connection, "SELECT * FROM images WHERE number = :number", {"number": int(reference)})
                if found:
                    return found[0]
            begins = _beginning(connection, digits)
            also = [f"the UUID of image {image.number} begins so" for image in begins]
            raise _unknown(connection, f"no image has the number {reference}", "; ".join(also))
        if len(digits) >= _PREFIX and set(digits) <= set("0123456789abcdef"):
            found = [image for image in _beginning(connection, digits) if text in (digits, _dashed(image)[: len(text)])]
            if len(found) == 1:
                return found[0]
            if found:
                numbers = ", ".join(str(image.number) for image in found)
                raise ConfigError(f"{reference!r} could be any of the images {numbers}", "Give more digits.")
        raise _unknown(connection, f"no image {reference!r:.60}")


def _beginning(connection: Connection, digits: str) -> list[Image]:
    """The images whose UUID begins so."""
    query = "SELECT * FROM images WHERE substr(uuid, 1, length(:digits)) = :digits ORDER BY number"
    return _load(connection, query, {"digits": digits})


def _dashed(image: Image) -> str:
    uuid = image.uuid
    return "-".join((uuid[:8], uuid[8:12], uuid[12:16], uuid[16:20], uuid[20:]))


def _unknown(connection: Connection, what: str, more: str = "") -> NotFound:
    known = connection.execute("SELECT number FROM images ORDER BY number DESC LIMIT 5").fetchall()
    if not known:
        return NotFound(
            what, "The catalog has none. It learns what a datastore holds by: vmkeep catalog rebuild DATASTORE"
        )
    newest_known = ", ".join(str(row["number"]) for row in known)
    return NotFound(
        what, sentences(f"{more[:1].upper()}{more[1:]}", f"The newest are: {newest_known}. See: vmkeep image list")
    )


def record(connection: Connection, recorded: Recorded) -> int:
    """Write one increment down and return its image's number. A new image closes the one that was open before it."""
    run, increment = recorded.run, recorded.increment
    row = connection.execute("SELECT number, state FROM images WHERE uuid = ?", (run.image,)).fetchone()
    if row is None:
        if increment.type is not Type.FULL:
            raise IntegrityError(f"image {run.image} is not in the catalog any more; the increment has no parent")
        connection.execute(
            "UPDATE images SET state = 'closed' WHERE vm_uuid = ? AND datastore = ? AND state = 'open'",
            (run.vm.uuid, run.datastore),
        )
        number = _insert_image(
            connection,
            uuid=run.image,
            vm_uuid=run.vm.uuid,
            vm_name=run.vm.name,
            datastore=run.datastore,
            state="open",
            pinned=False,
            why_closed=None,
            host=run.host,
            began=increment.date.astimezone(UTC).isoformat(),
            installation=run.installation or None,
            sequence=_next(connection, "images"),
        )
    else:
        number = int(row["number"])
        parent = connection.execute(
            "SELECT point FROM increments WHERE image = ? AND id = ?", (number, increment.pid)
        ).fetchone()
        if row["state"] != "open" or not run.parent or not parent or parent["point"] != run.parent.point:
            raise IntegrityError(f"image {number} changed while an increment for it was taken")
        # A VM or a host that was renamed is shown by its name of today.
        connection.execute("UPDATE images SET vm_name = ?, host = ? WHERE number = ?", (run.vm.name, run.host, number))
    insert(
        connection,
        number,
        increment,
        stored=recorded.stored,
        read=recorded.read,
        frozen_seconds=recorded.frozen_seconds,
        seconds=recorded.seconds,
        sequence=_next(connection, "increments"),
    )
    connection.executemany("DELETE FROM retired WHERE point = ?", [(point,) for point in run.spent])
    return number


def add(catalog: Catalog, image: Image) -> int | None:
    """Write a whole image down that was found in its datastore; its number, or None if the catalog has it already."""
    with catalog.writing() as connection:
        there = connection.execute("SELECT * FROM images WHERE uuid = ?", (image.uuid,)).fetchone()
        if there is not None and not _is_damaged(connection, there):
            return None
        if there is not None:  # as it was found it takes the place of what cannot be read, and stays pinned
            image = replace(image, pinned=bool(there["pinned"]))
            for table, column in (("flattens", "image"), ("increments", "image"), ("images", "number")):
                statement = f"DELETE FROM {table} WHERE {column} = ?"  # noqa: S608 - of the names above
                connection.execute(statement, (there["number"],))
        number = _insert_image(
            connection,
            uuid=image.uuid,
            vm_uuid=image.vm.uuid,
            vm_name=image.vm.name,
            datastore=image.datastore,
            state=image.state,
            pinned=image.pinned,
            why_closed=image.why_closed or None,
            host=image.host or None,
            began=_began(image),
            installation=image.installation or None,
            sequence=_room(connection, image),
            **({"number": there["number"]} if there is not None else {}),
        )
        for increment in image.increments:
            insert(connection, number, increment)  # how its run went is not in the datastore
    return number


def _is_damaged(connection: Connection, row: Row) -> bool:
    try:
        _whole(connection, row)
    except IntegrityError:
        return True
    return False


def _began(image: Image) -> str | None:
    return image.began.astimezone(UTC).isoformat() if image.began else None


def _next(connection: Connection, table: Literal["images", "increments"]) -> int:
    """The place of what is recorded now: behind all others."""
    query = f"SELECT coalesce(max(sequence), 0) + 1 FROM {table}"  # noqa: S608 - one of two names, by its type
    return int(connection.execute(query).fetchone()[0])


def _room(connection: Connection, image: Image) -> int:
    """The place of an image that was found in its datastore, among those that the catalog has of its VM there.

    Those behind it move by one.
    """
    there = connection.execute(
        "SELECT began, sequence FROM images WHERE vm_uuid = ? AND datastore = ? ORDER BY sequence, number",
        (image.vm.uuid, image.datastore),
    ).fetchall()
    at = place([row["began"] or "" for row in there], _began(image) or "", datetime.now(UTC).isoformat())
    if at == len(there) or there[at]["sequence"] is None:
        return _next(connection, "images")
    sequence = int(there[at]["sequence"])
    connection.execute("UPDATE images SET sequence = sequence + 1 WHERE sequence >= ?", (sequence,))
    return sequence


def _insert_image(connection: Connection, **values: str | int | bool | None) -> int:
    """Write a new image down, without its increments; its number."""
    done = connection.execute(
        "INSERT INTO images (number, uuid, vm_uuid, vm_name, datastore, state, pinned, why_closed, host, began,"
        " installation, sequence) VALUES (:number, :uuid, :vm_uuid, :vm_name, :datastore, :state, :pinned, :why_closed,"
        " :host, :began, :installation, :sequence)",
        {"number": None, **values},
    )
    return int(done.lastrowid or 0)


def insert(
    connection: Connection,
    number: int,
    increment: Increment,
    *,
    stored: int | None = None,
    read: int = 0,
    frozen_seconds: float = 0.0,
    seconds: float = 0.0,
    sequence: int | None = None,
) -> None:
    """Write one increment of the image of that number down; the rest is how its run went.

    `sequence` is its place among all that were recorded here, None for one that was found in its datastore.
    """
    kept = [key.name for key in fields(Disk) if key.name not in rows.PROOFS]
    disks = [{name: getattr(disk, name) for name in kept} for disk in increment.disks]
    known = any(disk.marked or disk.probes or disk.below is not None for disk in increment.disks)
    proofs = {disk.id: {name: getattr(disk, name) for name in rows.PROOFS} for disk in increment.disks}
    row = (
        *(number, increment.id, increment.pid, increment.type.value, increment.point, increment.source.token),
        *(increment.size, increment.date.astimezone(UTC).isoformat(), increment.consistency, increment.reason),
        *(increment.digest, json.dumps(disks), stored, read, frozen_seconds, seconds, sequence),
        json.dumps(proofs).encode() if known else None,
    )
    connection.execute(
        "INSERT INTO increments (image, id, pid, type, point, source, size, date, consistency, reason, digest, disks,"
        " stored, read, frozen_seconds, seconds, sequence, probes)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        row,
    )


def remove(catalog: Catalog, image: Image, own: Installation) -> None:
    """Forget an image and its increments.

    The points of one of `own` are kept as retired until the VM's next recorded run: their checkpoints go with that.
    """
    with catalog.writing() as connection:
        if own.owns(image):
            points.retire(connection, image.vm, [increment.point for increment in image.increments])
        connection.execute("DELETE FROM flattens WHERE image = ?", (image.number,))
        connection.execute("DELETE FROM increments WHERE image = ?", (image.number,))
        connection.execute("DELETE FROM images WHERE number = ?", (image.number,))


def pin(catalog: Catalog, image: Image, *, pinned: bool) -> None:
    """Mark an image as one that neither retention nor a user deletes, or take the mark away."""
    with catalog.writing() as connection:
        connection.execute("UPDATE images SET pinned = ? WHERE number = ?", (pinned, image.number))


def close(catalog: Catalog, image: Image, why: str = "") -> None:
    """Let no further increment be added to an image; `why` becomes the reason of the full that follows."""
    with catalog.writing() as connection:
        connection.execute(
            "UPDATE images SET state = 'closed', why_closed = ? WHERE number = ? AND state = 'open'",
            (why or None, image.number),
        )


def reopen(catalog: Catalog, image: Image) -> None:
    """Let increments be added again to an image that was closed, unless its VM has begun another meanwhile."""
    with catalog.writing() as connection:
        connection.execute(
            "UPDATE images SET state = 'open' WHERE number = ? AND state = 'closed' AND NOT EXISTS"
            " (SELECT 1 FROM images WHERE vm_uuid = ? AND datastore = ? AND number > ?)",
            (image.number, image.vm.uuid, image.datastore, image.number),
        )


def mark(catalog: Catalog, image: Image, *, damaged: bool) -> None:
    """Mark an image as damaged, or take the mark away; it is closed then, since its VM has begun another meanwhile."""
    if damaged:
        statement = "UPDATE images SET state = 'damaged' WHERE number = ? AND state IN ('open', 'closed')"
    else:
        statement = "UPDATE images SET state = 'closed' WHERE number = ? AND state = 'damaged'"
    with catalog.writing() as connection:
        connection.execute(statement, (image.number,))


def sources(catalog: Catalog, datastore: str, *, but: Image | None = None) -> set[SourceRef]:
    """Every source that the catalog's images have in a datastore; without those of image `but`, unless others share it.

    Two images may share sources: somebody has gone on from an older increment than the last.
    """
    query = """
        SELECT DISTINCT source FROM increments JOIN images ON image = number
        WHERE datastore = ? AND number IS NOT ?
    """
    with catalog.reading() as connection:
        found = connection.execute(query, (datastore, but.number if but else None)).fetchall()
    return rows.sources(found)


def tokens(catalog: Catalog) -> Sequence[str]:
    """The token of every source in the catalog."""
    with catalog.reading() as connection:
        return [row["source"] for row in connection.execute("SELECT source FROM increments")]


def last_dates(catalog: Catalog) -> dict[str, datetime]:
    """VM UUID -> the date of the backup that was recorded last."""
    query = """
        SELECT number, vm_uuid, increments.date FROM images
        JOIN (SELECT image, max(id) high FROM increments GROUP BY image) tips ON tips.image = number
        JOIN increments ON increments.image = number AND increments.id = high
        ORDER BY increments.sequence, images.sequence, number -- those that were not recorded here, NULL, come first
    """
    with catalog.reading() as connection:
        found = connection.execute(query).fetchall()
    dates = {}
    for row in found:
        try:
            dates[row["vm_uuid"]] = rows.date(row["date"])
        except ValueError as error:
            log.warning("image %d is damaged in the catalog: %s", row["number"], error)
    return dates
