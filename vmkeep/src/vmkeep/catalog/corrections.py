"""What the catalog learns from a datastore about images that it has: sources that moved, are lost, or were replaced."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from sqlite3 import Connection

from backupcore.errors import Busy
from backupcore.model import Image, SourceRef
from vmkeep.catalog import images, points
from vmkeep.catalog.database import Catalog
from vmkeep.installation import Installation

__all__ = ["lost", "mark", "move", "replace"]

_LOST = "lost"
"""The key in an increment's `proof` that says since when its source is known to be gone, or not whole."""


def lost(catalog: Catalog, image: Image) -> dict[int, str]:
    """The increments of an image whose sources are known to be gone, and since when (ISO 8601)."""
    query = "SELECT id, proof FROM increments WHERE image = ? AND proof IS NOT NULL"
    with catalog.reading() as connection:
        rows = connection.execute(query, (image.number,)).fetchall()
    found = {row["id"]: json.loads(row["proof"]).get(_LOST) for row in rows}
    return {number: since for number, since in found.items() if since}


def mark(catalog: Catalog, image: Image, gone: Mapping[int, str]) -> None:
    """Mark these increments as lost, with the reason of each, and no others.

    The image is damaged then; one that was damaged for this alone, and has lost nothing any more, is closed.
    """
    with catalog.writing() as connection:
        rows = connection.execute("SELECT id, proof FROM increments WHERE image = ?", (image.number,)).fetchall()
        before = set()
        for row in rows:
            proof = json.loads(row["proof"]) if row["proof"] else {}
            if _LOST in proof:
                before.add(row["id"])
            if (_LOST in proof) == (row["id"] in gone):
                continue
            if row["id"] in gone:
                proof[_LOST] = datetime.now(UTC).isoformat()
            else:
                del proof[_LOST]
            connection.execute(
                "UPDATE increments SET proof = ? WHERE image = ? AND id = ?",
                (json.dumps(proof) if proof else None, image.number, row["id"]),
            )
        if gone:
            connection.execute(
                "UPDATE images SET state = 'damaged', why_closed = ? WHERE number = ?"
                " AND state IN ('open', 'closed', 'damaged')",
                ("; ".join(gone[number] for number in sorted(gone)[:3]), image.number),
            )
        elif before:
            connection.execute(
                "UPDATE images SET state = 'closed' WHERE number = ? AND state = 'damaged'", (image.number,)
            )


def move(catalog: Catalog, image: Image, moved: Mapping[int, SourceRef]) -> None:
    """The sources of these increments have other tokens by now."""
    with catalog.writing() as connection:
        connection.executemany(
            "UPDATE increments SET source = ? WHERE image = ? AND id = ?",
            [(source.token, image.number, number) for number, source in moved.items()],
        )


def replace(
    catalog: Catalog,
    before: Image,
    after: Image,
    own: Installation,
    *,
    keep: Collection[int] = (),
    healed: bool = False,
) -> None:
    """Put the increments, names and owner of `after` in the place of those of `before`, which is closed by it.

    What both have stays as it is, with how its run went. The checkpoints of points that go are nobody's any more, where
    the image is `own`'s. Busy where the catalog has something else by now than `before`. `keep` are IDs of `before`
    that stay besides. One that is damaged stays so, unless it is `healed`.
    """
    with catalog.writing() as connection:
        now = connection.execute("SELECT state FROM images WHERE uuid = ?", (before.uuid,)).fetchone()
        if now is None or now["state"] != before.state or _rows(connection, before) != _of(before):
            raise Busy(f"image {before.number} changed meanwhile", "Run it again.")
        there = {one.id: one for one in before.increments}
        wanted = {one.id: one for one in after.increments}
        for number, one in there.items():
            other = wanted.get(number)
            if other is not None and (other.point, other.digest, other.pid) == (one.point, one.digest, one.pid):
                connection.execute(
                    "UPDATE increments SET source = ? WHERE image = ? AND id = ?",
                    (other.source.token, before.number, number),
                )
                del wanted[number]
            elif other is not None or number not in keep:
                connection.execute("DELETE FROM increments WHERE image = ? AND id = ?", (before.number, number))
        for one in wanted.values():
            images.insert(connection, before.number, one)
        held = {one.point for one in after.increments}
        gone = [one.point for number, one in there.items() if one.point not in held and number not in keep]
        if own.owns(before):
            points.retire(connection, before.vm, gone)
        connection.execute(
            "UPDATE images SET state = CASE WHEN state = 'damaged' AND NOT ? THEN state ELSE 'closed' END,"
            " why_closed = ?, vm_name = ?, host = ?, installation = ?, began = ? WHERE number = ?",
            (
                healed,
                after.why_closed or None,
                after.vm.name,
                after.host or None,
                after.installation or None,
                after.began.astimezone(UTC).isoformat() if after.began else None,
                before.number,
            ),
        )


def _rows(connection: Connection, image: Image) -> list[tuple[int, str]]:
    rows = connection.execute("SELECT id, source FROM increments WHERE image = ? ORDER BY id", (image.number,))
    return [(row["id"], row["source"]) for row in rows]


def _of(image: Image) -> list[tuple[int, str]]:
    return [(one.id, one.source.token) for one in image.increments]
