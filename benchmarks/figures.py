"""What is measured: one figure of one work, and how it reads."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["MIB", "Figure", "Spread", "line"]

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some figures, the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Spread:
        """Of at least one figure."""
        return cls(statistics.median(figures), min(figures), max(figures))

    def __str__(self) -> str:
        if self.high >= 1000:
            return f"{self.median:.0f} ({self.low:.0f} to {self.high:.0f})"
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure, over all rounds.

    `what` is the work, `by` who did it ("vmkeep", or "vmkeep : restic" for a ratio), `measure` what was measured of it
    ("wall", "memory", or a ratio of one: "wall ratio"). `at_most` is the target for the median, None where there is
    none. `commands` are those of one round of the work, at the first of its figures.
    """

    what: str
    by: str
    measure: str
    unit: str
    spread: Spread
    at_most: float | None = None
    commands: tuple[str, ...] = ()

    @property
    def met(self) -> bool | None:
        """Whether the median meets the target; None without one."""
        return None if self.at_most is None else self.spread.median <= self.at_most

    def as_json(self) -> dict[str, Any]:
        """With the verdict, for machines."""
        return {**asdict(self), "met": self.met}

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Figure:
        """What `as_json` gave."""
        return cls(
            what=told["what"],
            by=told["by"],
            measure=told["measure"],
            unit=told["unit"],
            spread=Spread(**told["spread"]),
            at_most=told["at_most"],
            commands=tuple(told["commands"]),
        )

    def __str__(self) -> str:
        target = "" if self.met is None else f" [at most {self.at_most:g}: {'met' if self.met else 'MISSED'}]"
        return f"{self.measure} {self.spread}{' ' if self.unit else ''}{self.unit}{target}"


def line(figures: Sequence[Figure]) -> str:
    """The figures of one work by one of its rivals, in a line of text."""
    return f"{figures[0].what}, {figures[0].by}: {', '.join(map(str, figures))}"
