"""What keeps an image from being deleted besides its pin: a lock of its datastore, or a datastore that deletes nothing.

In the catalog it is the column `holds` of an image, a JSON list of objects; those of another `kind` are left alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from sqlite3 import Connection
from typing import Any

from vmkeep.catalog.database import Catalog

__all__ = ["AGAIN", "LOCK", "POLICY", "Hold", "active", "hold", "release", "words"]

LOCK = "lock"
"""A lock of these very backups, as by S3's Object Lock."""

POLICY = "policy"
"""The datastore deletes nothing, as an append-only repository: it counts for all images there."""

AGAIN = timedelta(days=7)
"""How long a refusal without a date counts; then it is tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """`until` is when a delete is possible again, None where nobody says; `noted` is when that was found."""

    kind: str
    until: datetime | None
    noted: datetime

    @property
    def ends(self) -> datetime:
        """From when on a delete is worth a try."""
        return self.until or self.noted + AGAIN


def active(catalog: Catalog, now: datetime) -> dict[int, Hold]:
    """Image number -> the hold that lasts longest, of those images that have one now."""
    with catalog.reading() as connection:
        rows = connection.execute("SELECT number, datastore, holds FROM images").fetchall()
    own: dict[int, list[Hold]] = {}
    of_all: dict[str, list[Hold]] = {}
    for row in rows:
        found = [one for one in map(_hold, _list(row["holds"])) if one and one.ends > now]
        own[row["number"]] = found
        of_all.setdefault(row["datastore"], []).extend(one for one in found if one.kind == POLICY)
    return {
        row["number"]: max(held, key=lambda one: one.ends)
        for row in rows
        if (held := own[row["number"]] + of_all[row["datastore"]])
    }


def words(held: Hold) -> str:
    """What keeps it, and until when, after "but" or in a list."""
    if held.kind == POLICY and held.until is None:
        return f"its datastore deletes nothing (append-only); it is asked again from {held.ends:%Y-%m-%d} on"
    until = f" until {held.until.astimezone(UTC):%Y-%m-%d %H:%M} UTC" if held.until else " for a time that is not known"
    return f"its datastore locks it{until}"


def hold(catalog: Catalog, number: int, until: datetime | None, kind: str, now: datetime) -> Hold:
    """Note that the datastore refuses to delete what lies in this image, or in its place."""
    found = Hold(kind=kind, until=until, noted=now)
    with catalog.writing() as connection:
        _change(connection, number, found)
    return found


def release(catalog: Catalog, datastore: str) -> None:
    """The datastore has deleted something: it does so again."""
    with catalog.writing() as connection:
        rows = connection.execute(
            "SELECT number FROM images WHERE datastore = ? AND holds LIKE ?", (datastore, f'%"{POLICY}"%')
        ).fetchall()
        for row in rows:
            _change(connection, row["number"], None, POLICY)


def _change(connection: Connection, number: int, new: Hold | None, kind: str = "") -> None:
    row = connection.execute("SELECT holds FROM images WHERE number = ?", (number,)).fetchone()
    if row is None:
        return
    others = [one for one in _list(row["holds"]) if one.get("kind") != (new.kind if new else kind)]
    if new:
        until = new.until.astimezone(UTC).isoformat() if new.until else None
        others.append({"kind": new.kind, "until": until, "noted": new.noted.astimezone(UTC).isoformat()})
    connection.execute("UPDATE images SET holds = ? WHERE number = ?", (json.dumps(others) if others else None, number))


def _list(text: str | None) -> list[dict[str, Any]]:
    try:
        found = json.loads(text or "[]")
    except ValueError:
        return []
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _hold(said: dict[str, Any]) -> Hold | None:
    if said.get("kind") not in (LOCK, POLICY):
        return None
    try:
        until = datetime.fromisoformat(said["until"]) if said.get("until") else None
        return Hold(kind=said["kind"], until=until, noted=datetime.fromisoformat(said["noted"]))
    except (KeyError, TypeError, ValueError):
        return None
