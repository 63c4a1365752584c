"""The checks of the kit, by subject. `CHECKS` is all of them, in the order in which they are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from backupcore.testing.bench import Bench
from backupcore.testing.checks import (
    contents,
    damage,
    deletion,
    failures,
    kills,
    listing,
    merging,
    neighbours,
    options,
    secrecy,
    tokens,
    verbs,
    whole,
)

__all__ = ["CHECKS", "Check"]


@dataclass(frozen=True)
class Check:
    """One check: its name, what it asks for in one line, and the function that makes it."""

    name: str
    title: str
    function: Callable[[Bench], None]

    def __repr__(self) -> str:
        return self.name


CHECKS = tuple(
    Check(function.__name__.replace("_", "-"), (function.__doc__ or "").partition("\n")[0].rstrip("."), function)
    for function in (
        verbs.hooks,
        options.wrong_options,
        options.secret_options,
        verbs.answers,
        verbs.away,
        verbs.usage,
        contents.round_trip,
        contents.odd_names,
        contents.read_at,
        contents.several_readers,
        contents.closed_early,
        contents.other_process,
        tokens.token,
        tokens.two_tokens,
        tokens.unknown_tokens,
        tokens.mixed_tokens,
        listing.labels,
        listing.only_complete,
        deletion.delete,
        verbs.builds_on,
        verbs.postbackup,
        failures.giver_fails,
        failures.giver_lies,
        failures.cancelled,
        failures.no_child_survives,
        kills.killed,
        kills.killed_at_the_end,
        neighbours.concurrent,
        neighbours.two_hosts,
        merging.flatten,
        secrecy.secrets,
        whole.chain,
        damage.damage,  # the last: the datastore may be of no use afterwards
    )
)
