"""Rows of the catalog, read as what they should be: a bit may have flipped, or somebody has written there by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from sqlite3 import Row
from typing import Any, TypeVar

from backupcore.errors import ContractViolation, IntegrityError
from backupcore.model import Disk, SourceRef
from vmkeep.catalog.database import HINT

__all__ = ["PROOFS", "WRONG", "date", "disks", "optional", "proofs", "reading", "required", "source", "sources"]

T = TypeVar("T")

PROOFS = ("marked", "below", "probes")
"""The fields of a disk that lie in a column of their own: only of the last increment of an image are they needed."""

WRONG = (ValueError, TypeError, KeyError, AttributeError, OverflowError)
"""What reading a row that is wrong raises, here and where it is made use of."""


@contextmanager
def reading(what: str, hint: str) -> Iterator[None]:
    """IntegrityError where a row that the block reads is none that vmkeep has written; `what` names it."""
    try:
        yield
    except IndexError as error:  # a column of that name is not there: this is no matter of one row
        raise IntegrityError(f"the catalog is damaged: {what}: {_told(error)}", HINT) from error
    except WRONG as error:
        raise IntegrityError(f"{what}, is damaged in the catalog: {_told(error)}", hint) from error


def _told(error: Exception) -> str:
    return f"{error!s:.100}" or type(error).__name__


def required(row: Row, name: str, kind: type[T]) -> T:
    """The value of a column, of this type. ValueError if it is of another."""
    value = row[name]
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {value!r:.60}")  # noqa: TRY004 - of a row, as any other that is wrong
    return value


def optional(row: Row, name: str) -> str:
    """The text in a column, "" for NULL. ValueError if it is no text."""
    return "" if row[name] is None else required(row, name, str)


def date(value: object, name: str = "date") -> datetime:
    """A date as it is written in the catalog. ValueError if it is none, or has no time zone."""
    try:
        found = datetime.fromisoformat(str(value))
    except ValueError:
        found = None
    if found is None or found.tzinfo is None or not isinstance(value, str):
        raise ValueError(f"{name} is {value!r:.60}")
    return found


def source(value: object) -> SourceRef:
    """The source of that token. ValueError if it is none."""
    try:
        return SourceRef(value)  # type: ignore[arg-type]  # it looks itself
    except ContractViolation:
        raise ValueError(f"source is {value!r:.60}") from None


def sources(found: Iterable[Row]) -> set[SourceRef]:
    """Those in the column `source` of these rows; what is no token there names nothing in a datastore."""
    return {source(row["source"]) for row in found if _is_token(row["source"])}


def _is_token(value: object) -> bool:
    try:
        source(value)
    except ValueError:
        return False
    return True


def disks(row: Row) -> tuple[Disk, ...]:
    """The disks of an increment. ValueError or TypeError if they are none."""
    text = required(row, "disks", str)
    try:
        found = json.loads(text)
        made = tuple(Disk(**disk) for disk in found) if isinstance(found, list) else None
    except (ValueError, TypeError, RecursionError):
        made = None
    if made is None or not all(isinstance(disk.id, str) and isinstance(disk.virtual_size, int) for disk in made):
        raise ValueError(f"disks is {text!r:.60}")
    return made


def proofs(row: Row) -> Mapping[str, Mapping[str, Any]]:
    """Those fields of an increment's disks, by ID. ValueError if they are none."""
    text = row["probes"]
    if text is None:
        return {}
    try:
        found = json.loads(text)
        made = {key: Disk(id=key, artifact="", virtual_size=0, whole=True, **value) for key, value in found.items()}
        wrong = [key for key, value in found.items() if set(value) - set(PROOFS)]
    except (ValueError, TypeError, AttributeError, RecursionError):
        made, wrong = {}, [""]
    if wrong or not all(isinstance(digest, str) for disk in made.values() for _, digest in disk.probes):
        raise ValueError(f"probes is {text!r:.60}")
    return {key: {name: getattr(disk, name) for name in PROOFS} for key, disk in made.items()}
