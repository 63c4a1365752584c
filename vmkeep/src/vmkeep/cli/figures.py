"""Figures for people: sizes, ages, dates. `--json` has plain bytes, seconds and ISO 8601."""

from __future__ import annotations

from datetime import UTC, datetime

__all__ = ["age", "date", "iso", "seconds", "size"]

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")


def size(count: int | None) -> str:
    """``1.5 GiB``; ``-`` where it is not known."""
    if count is None:
        return "-"
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in _UNITS:
        value /= 1024
        if value < 1000 or unit == _UNITS[-1]:
            return f"{value:.1f} {unit}"
    return ""


def seconds(count: float) -> str:
    """``0.004 s``, ``12.3 s``, ``4 min 10 s``, ``2 h 5 min``."""
    if count < 60:
        return f"{count:.3f} s" if count < 1 else f"{count:.1f} s"
    minutes, rest = divmod(round(count), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def age(count: int) -> str:
    """``5 min``, ``3 h``, ``12 d``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if count >= 2 * length:
            return f"{count // length} {unit}"
    return f"{count} s"


def date(when: datetime | None) -> str:
    """In the local time zone, to the second."""
    return f"{when.astimezone():%Y-%m-%d %H:%M:%S}" if when else "-"


def iso(when: datetime | None) -> str | None:
    """ISO 8601 in UTC, to the second: ``2026-05-04T03:02:01Z``."""
    return f"{when.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}" if when else None
