"""A run's labels as metadata of its manifest, and back.

All of them are one entry, ``x-amz-meta-labels: vm=…&image=…``: names of entries lose their case on the way, and a
server may drop an entry without a value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from urllib.parse import parse_qsl, urlencode

__all__ = ["from_manifest", "from_metadata", "to_metadata"]

_ENTRY = "labels"


def to_metadata(labels: Mapping[str, str]) -> dict[str, str]:
    """The metadata that carries these labels."""
    return {_ENTRY: urlencode(labels, safe=":")}


def from_metadata(metadata: Mapping[str, str]) -> dict[str, str] | None:
    """The labels in an object's metadata, None where there are none."""
    text = metadata.get(_ENTRY)
    return dict(parse_qsl(text, keep_blank_values=True)) if text else None


def from_manifest(manifest: bytes) -> dict[str, str]:
    """The same from the manifest itself, for a bucket that was copied by a program which drops metadata.

    {} if it is no manifest: the core says what is wrong with it once it is read for more than a listing.
    """
    try:
        said = json.loads(manifest)
        return {
            "vm": str(said["vm"]["uuid"]),
            "image": str(said["image"]),
            "number": str(said["number"]),
            "point": str(said["point"]),
            "parent": str(said["parent"]["point"]) if said["parent"] else "",
            "type": str(said["type"]),
            "date": f"{str(said['date'])[:19]}Z",
            **({"installation": str(said["installation"])} if said.get("installation") else {}),
        }
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}
