"""The order in which files of tests are handed out: those that take longest first, so that none is begun last.

`lab/longest_first` names them. Whoever hands files out by their number of tests, as pytest-xdist does unless it is told
not to, begins with quick tests of the core and ends with one worker in a file of three tests that take a minute.
"""

from __future__ import annotations

from pathlib import Path

import pytest

__all__ = ["LONGEST_FIRST", "longest"]

LONGEST_FIRST = Path(__file__).parent / "longest_first"


def longest() -> list[str]:
    """The files that go first, by their paths from the repository's root."""
    lines = (line.split("#", 1)[0].strip() for line in LONGEST_FIRST.read_text().splitlines())
    return [line for line in lines if line]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {file: place for place, file in enumerate(longest())}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))
