"""The file below an image, as a qcow2 header names it: a path, or ``json:`` with the options of QEMU's block layer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Backing", "backing_of"]

_JSON = "json:"
_LOCAL = ("file", "host_device")


@dataclass(frozen=True, slots=True)
class Backing:
    """The file below an image: its path, and its format (None where nothing says it).

    What is no local file has no path that begins with a slash.
    """

    path: str
    shape: str | None


def backing_of(info: Mapping[str, Any]) -> Backing | None:
    """What ``qemu-img info --output=json`` says of the file below; None where there is none."""
    name = info.get("full-backing-filename") or info.get("backing-filename")
    if not name:
        return None
    shape = info.get("backing-filename-format")
    if not str(name).startswith(_JSON):
        return Backing(str(name), shape)
    return _by_options(str(name), shape) or Backing(str(name), shape)


def _by_options(name: str, shape: str | None) -> Backing | None:
    """The local file that ``json:`` options lead to, all of it and nothing else; None where they say anything more."""
    try:
        parsed = json.loads(name.removeprefix(_JSON))
    except (ValueError, RecursionError):  # a name may be a thousand brackets
        return None
    if not isinstance(parsed, dict):
        return None
    options = dict(_flat(parsed))
    if set(options) - {"driver", "file.driver", "file.filename"} or options.get("file.driver", "file") not in _LOCAL:
        return None
    path, driver = options.get("file.filename", ""), options.get("driver", shape)
    # Of two formats QEMU would take the header's.
    if not path.startswith("/") or driver not in ("qcow2", "raw") or shape not in (None, driver):
        return None
    return Backing(path, driver)


def _flat(options: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, str]]:
    """``{"file": {"driver": "file"}}`` as QEMU takes it as well: ``file.driver``."""
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{within}{key}.")
        else:
            yield f"{within}{key}", str(value)
