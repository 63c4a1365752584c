"""By what the place of a datastore is known, and which images lie there."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime

from backupcore.errors import NotFound, TargetUnavailable
from backupcore.model import Image, Listed
from backupcore.near import near
from backupcore.typed import typed
from vmkeep.catalog import flattens, images, rows
from vmkeep.catalog.database import Catalog

__all__ = ["Known", "Sorted", "held", "known", "learn", "mean", "require_here", "sort"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """By what a datastore's place is known, and since when."""

    identity: str
    since: datetime


def known(catalog: Catalog, name: str) -> Known | None:
    """By what the place of the datastore `name` is known; None where it is not, or where its driver tells none."""
    with catalog.reading() as connection:
        row = connection.execute("SELECT identity, since FROM datastores WHERE name = ?", (name,)).fetchone()
    if row is None:
        return None
    with rows.reading(f"by what datastore {name} is known", f"Say it again: {typed('vmkeep datastore adopt', name)}"):
        return Known(identity=rows.required(row, "identity", str), since=rows.date(row["since"], "since"))


def learn(catalog: Catalog, name: str, identity: str) -> None:
    """Note by what the place of the datastore `name` is known from now on. What is known already stays."""
    with catalog.writing() as connection:
        connection.execute(
            "INSERT OR IGNORE INTO datastores (name, identity, since) VALUES (?, ?, ?)",
            (name, identity, datetime.now(UTC).isoformat()),
        )


def held(catalog: Catalog, name: str) -> set[str]:
    """The token of every source that should lie in the datastore `name` as it is now."""
    query = "SELECT source FROM increments JOIN images ON number = image WHERE datastore = ? AND state <> 'absent'"
    with catalog.reading() as connection:
        return {row["source"] for row in connection.execute(query, (name,))}


def require_here(image: Image, configured: Collection[str]) -> Image:
    """The image. TargetUnavailable for one that lies in another place than its datastore is now; NotFound where that is
    not one of those that are `configured`.
    """
    if image.state == "absent":
        raise TargetUnavailable(
            f"image {image.number} of VM {image.vm.name} is absent: {image.why_closed}",
            f"Bring back the place that it lies in, then: {typed('vmkeep datastore adopt', image.datastore)} (or by "
            "the name that this place has in the configuration by now).",
        )
    if image.datastore not in configured:
        raise NotFound(
            f"image {image.number} of VM {image.vm.name} lies in datastore {image.datastore}, which is not configured",
            f"{near(image.datastore, configured)} If its place has another name now, its images follow with "
            "'vmkeep datastore adopt NAME'; else write it into the configuration again.",
        )
    return image


@dataclass(frozen=True, slots=True, kw_only=True)
class Sorted:
    """The images of a datastore by whether they lie in the place that is meant.

    `moved` are those that lie there as well, and that the catalog has under another name: one that is not configured
    any more, or one whose place was said to be elsewhere since. `left` is what flattens have left to be deleted there,
    under a name that is not configured any more.
    """

    here: tuple[Image, ...]
    absent: tuple[Image, ...]
    moved: tuple[Image, ...]
    left: tuple[flattens.Leftover, ...]


def sort(catalog: Catalog, name: str, listed: Collection[Listed], configured: Collection[str]) -> Sorted:
    """Which images lie in a place that lists these: those of which it has any source.

    A source may have another token than it had, as in a repository that was copied (``restic copy``): its point tells.
    """
    tokens = {one.source.token for one in listed}
    points = {one.labels["point"] for one in listed if one.labels.get("point")}
    here: list[Image] = []
    absent: list[Image] = []
    moved: list[Image] = []
    for image in images.where(catalog):
        there = any(one.source.token in tokens or one.point in points for one in image.increments)
        if image.datastore == name:
            (here if there else absent).append(image)
        elif there and (image.state == "absent" or image.datastore not in configured):
            moved.append(image)
    left = [one for owner in flattens.owners(catalog) for one in flattens.leftovers(catalog, owner)]
    left = [one for one in left if one.datastore not in configured and one.source.token in tokens]
    return Sorted(here=tuple(here), absent=tuple(absent), moved=tuple(moved), left=tuple(left))


_WHY_ABSENT = "its backups are not in the place that datastore {} was said to be on {:%Y-%m-%d}"
_WHY_MOVED = "its datastore, {}, has got another name"


def mean(catalog: Catalog, name: str, identity: str | None, found: Sorted) -> None:
    """Note that a place is meant from now on, and which images lie there. Nothing of the catalog is given up.

    An image that was absent and is there is closed: its VM has begun another meanwhile. A flatten of one that is absent
    is not finished; nothing of the image itself was touched by it.
    """
    now = datetime.now(UTC)
    with catalog.writing() as connection:
        connection.execute("DELETE FROM datastores WHERE name = ?", (name,))
        if identity is not None:
            connection.execute(
                "INSERT INTO datastores (name, identity, since) VALUES (?, ?, ?)", (name, identity, now.isoformat())
            )
        why = _WHY_ABSENT.format(name, now)
        for image in found.absent:
            connection.execute("DELETE FROM flattens WHERE image = ?", (image.number,))
            connection.execute(
                "UPDATE images SET state = 'absent', why_closed = ? WHERE number = ? AND state <> 'absent'",
                (why, image.number),
            )
        for image in found.here:
            connection.execute(
                "UPDATE images SET state = 'closed' WHERE number = ? AND state = 'absent'", (image.number,)
            )
        for image in found.moved:
            connection.execute(
                "UPDATE images SET datastore = ?,"
                " why_closed = CASE WHEN state IN ('open', 'absent') THEN ? ELSE why_closed END,"
                " state = CASE WHEN state IN ('open', 'absent') THEN 'closed' ELSE state END"
                " WHERE number = ?",
                (name, _WHY_MOVED.format(image.datastore), image.number),
            )
        connection.executemany(
            "UPDATE leftovers SET datastore = ? WHERE datastore = ? AND source = ?",
            [(name, one.datastore, one.source.token) for one in found.left],
        )
