"""Where the objects of a source lie, and how its token names that place.

``<prefix>/<VM uuid>/<32 hex>/<artifact>``; the token is ``<VM uuid>.<32 hex>``. What else lies there is not ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from backupcore.model import SourceRef, new_id

__all__ = ["MANIFEST", "MARKER", "UNFINISHED", "Place", "clean_prefix"]

MANIFEST = "manifest.json"

UNFINISHED = "_unfinished"
"""Beside the artifacts of an upload that is under way: whose it is. No artifact can have a name that begins so."""

MARKER = "_datastore"
"""Below the prefix: 32 hex digits by which this place is known, for good."""

_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_HEX = r"[0-9a-f]{32}"
_TOKEN = re.compile(rf"({_UUID})\.({_HEX})")
_KEY = re.compile(rf"({_UUID})/({_HEX})/([A-Za-z0-9_][A-Za-z0-9._-]{{0,126}})")


def clean_prefix(prefix: str) -> str:
    """The prefix of every key: "" or a path that ends in a slash."""
    trimmed = prefix.strip("/")
    return f"{trimmed}/" if trimmed else ""


@dataclass(frozen=True, slots=True)
class Place:
    """The folder of one source below the prefix."""

    vm: str
    id: str

    @classmethod
    def new(cls, vm: str) -> Place:
        """A place that nobody has used: two runs never write to one, also where a server lets them."""
        return cls(vm, new_id())

    @classmethod
    def of_token(cls, token: str) -> Place | None:
        """The place that a token names, None if it is none of ours."""
        found = _TOKEN.fullmatch(token)
        return cls(*found.groups()) if found else None

    @classmethod
    def of_key(cls, key: str) -> tuple[Place, str] | None:
        """The place and the name of an object (its key without the prefix), None if it is none of ours."""
        found = _KEY.fullmatch(key)
        return (cls(found[1], found[2]), found[3]) if found else None

    @property
    def source(self) -> SourceRef:
        """The source that is kept here."""
        return SourceRef(f"{self.vm}.{self.id}")

    @property
    def folder(self) -> str:
        """The common beginning of its keys, without the prefix."""
        return f"{self.vm}/{self.id}/"

    def key(self, name: str) -> str:
        """The key of one object, without the prefix."""
        return f"{self.folder}{name}"
