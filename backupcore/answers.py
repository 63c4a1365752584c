"""What a driver answers, held against the contract before anybody believes it.

All of these raise a ContractViolation that says what is wrong with the answer; `backupcore.strays` adds whose it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from backupcore.errors import ContractViolation
from backupcore.model import Artifact, Listed, SourceRef, Stored, Usage, check_name

__all__ = ["checked_artifacts", "checked_listed", "checked_locks", "checked_stored", "checked_until", "checked_usage"]

MOST = (1 << 63) - 1
"""Bytes: no disk is larger, and no database takes more."""


def checked_stored(hook: str, stored: object) -> Stored:
    """The answer to `backup` and `flatten`."""
    if not isinstance(stored, Stored):
        raise ContractViolation(f"{hook} returned {type(stored).__name__}: it must be a Stored")
    if not isinstance(stored.source, SourceRef):
        raise ContractViolation(f"{hook} returned a source that is no SourceRef but {type(stored.source).__name__}")
    _check_bytes(f"{hook} returned stored", stored.stored)
    return Stored(source=_plain(stored.source), stored=stored.stored)


def checked_artifacts(found: Sequence[Any], source: SourceRef) -> dict[str, tuple[Artifact, int]]:
    """The answer to `restore`: name -> artifact, and its size."""
    by_name: dict[str, tuple[Artifact, int]] = {}
    for artifact in found:
        if not isinstance(artifact, Artifact):
            raise ContractViolation(f"restore returned {type(artifact).__name__} among the artifacts of {source}")
        name, size = check_name(artifact.name), artifact.size
        if size is None:
            raise ContractViolation(f"restore returned artifact {name} without a size")
        _check_bytes(f"restore returned artifact {name} with size", size)
        if name in by_name:
            raise ContractViolation(f"restore names artifact {name} of {source} twice")
        by_name[name] = artifact, size
    return by_name


def checked_listed(found: object, check: Callable[[], None]) -> list[Listed]:
    """The answer to `sources`, which may be lazy: all of it. `check` raises what is to stop it meanwhile: a store that
    gives the same page again and again would have it go on for ever.
    """
    if not isinstance(found, Iterable):
        raise ContractViolation(f"sources returned {type(found).__name__}: it must be an iterable of Listed")
    listed = []
    for one in found:
        check()
        if not isinstance(one, Listed):
            raise ContractViolation(f"sources gave {type(one).__name__} where a Listed was expected")
        if not isinstance(one.source, SourceRef):
            raise ContractViolation(f"sources gave a source that is no SourceRef but {type(one.source).__name__}")
        if not isinstance(one.labels, Mapping) or not all(
            isinstance(text, str) for pair in one.labels.items() for text in pair
        ):
            raise ContractViolation(f"sources gave {one.source} with labels that are no table of strings")
        _check_bytes(f"sources gave {one.source} with size", one.size)
        # A driver may fill the same table of labels anew for each.
        listed.append(Listed(source=_plain(one.source), labels=dict(one.labels), size=one.size))
    return listed


def checked_usage(found: Usage) -> Usage:
    """The answer to `usage`."""
    for name in ("used", "total", "free"):
        _check_bytes(f"usage returned {name}", getattr(found, name))
    return found


def checked_locks(found: Mapping[Any, Any], asked: Sequence[SourceRef]) -> dict[SourceRef, datetime | None]:
    """The answer to `locks`, of these sources alone."""
    locks = {}
    for source, until in found.items():
        if not isinstance(source, SourceRef):
            raise ContractViolation(f"locks gave a source that is no SourceRef but {type(source).__name__}")
        if (plain := _plain(source)) not in asked:
            raise ContractViolation(f"locks gave {source}, which it was not asked for")
        locks[plain] = checked_until(f"locks gave {source} until", until)
    return locks


def checked_until(what: str, until: object) -> datetime | None:
    """Until when something is locked, in UTC; None where nobody says.

    A time without a zone is refused: hours off, it says nothing of when a lock ends. A store may well mean the end of
    all days, which lies beyond the last one of UTC where its zone is another.
    """
    if until is None:
        return None
    if not isinstance(until, datetime) or until.utcoffset() is None:
        raise ContractViolation(f"{what} {until!r:.80}, neither a time with its zone nor None")
    try:
        return until.astimezone(UTC)
    except OverflowError:
        return datetime.max.replace(tzinfo=UTC)


def _plain(source: SourceRef) -> SourceRef:
    """The same in the core's own types: one of a driver's may be equal to none, and a backup would seem to be gone."""
    return SourceRef(str.__str__(source.token))


def _check_bytes(what: str, value: object) -> None:
    if value is not None and (type(value) is not int or not 0 <= value <= MOST):
        raise ContractViolation(f"{what}={value!r:.40} cannot be: it must be a whole number of bytes")
