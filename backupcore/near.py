"""What somebody may have meant by a name that nothing has."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["near"]

_ALL = 20  # names that a hint lists, where none of them is near


def near(name: str, known: Iterable[str]) -> str:
    """A hint with the known names nearest to `name`; with all of them, if there are few and none is near."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    more = f", and {len(names) - _ALL} others" if len(names) > _ALL else ""
    return f"There is: {', '.join(names[:_ALL]) or 'none'}{more}."
