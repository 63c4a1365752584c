"""Where an image belongs that was not recorded here, but found in a datastore: only its date tells."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["place"]


def place(dates: Sequence[str], date: str, now: str) -> int:
    """The index, among images of these `dates` that stand in their order, at which one of `date` belongs.

    That is before the first that is younger, or that was recorded after a younger one. Dates are ISO 8601 in UTC, and
    as wrong as a host's clock was: one after `now` tells nothing of those behind it.
    """
    latest = ""
    for index, one in enumerate(dates):
        if latest < one <= now:
            latest = one
        if latest > date:
            return index
    return len(dates)
