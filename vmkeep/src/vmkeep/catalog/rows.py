"""Rows of the catalog, read as what they should be: a bit may have flipped, or somebody has written there by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from sqlite3 import Row
from typing import TypeVar

from backupcore.errors import ContractViolation, IntegrityError
from backupcore.model import Disk, SourceRef
from vmkeep.catalog.database import HINT

__all__ = ["WRONG", "date", "disks", "optional", "reading", "required", "source"]

T = TypeVar("T")

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
