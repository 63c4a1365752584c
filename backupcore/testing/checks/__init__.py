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
    large,
    listing,
    merging,
    neighbours,
    options,
    place,
    secrecy,
    store,
    tokens,
    traces,
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
    base: bool = False
    """Whether all others stand on it: where it fails they are not made."""

    def __repr__(self) -> str:
        return self.name


_BASE = (verbs.hooks, verbs.answers)

CHECKS = tuple(
    Check(
        function.__name__.replace("_", "-"),
        (function.__doc__ or "").partition("\n")[0].rstrip("."),
        function,
        function in _BASE,
    )
    for function in (
        verbs.hooks,
        options.wrong_options,
        options.secret_options,
        verbs.answers,
        verbs.away,
        verbs.usage,
        place.identity,
        place.new_place,
        contents.round_trip,
        contents.odd_names,
        contents.read_at,
        contents.several_readers,
        contents.closed_early,
        contents.other_process,
        tokens.token,
        tokens.two_tokens,
        tokens.new_token,
        tokens.unknown_tokens,
        tokens.mixed_tokens,
        listing.labels,
        listing.only_complete,
        listing.sources_of,
        deletion.delete,
        deletion.deleted_for_all,
        deletion.locks,
        verbs.builds_on,
        verbs.postbackup,
        failures.giver_fails,
        failures.giver_lies,
        failures.cancelled,
        failures.cancelled_late,
        failures.no_child_survives,
        kills.killed,
        kills.manifest_last,
        kills.killed_at_the_end,
        kills.killed_deleting,
        store.refused_writes,
        store.stalled,
        traces.litter,
        traces.leaks,
        large.large,
        neighbours.concurrent,
        neighbours.two_hosts,
        merging.flatten,
        secrecy.secrets,
        whole.chain,
        damage.damage,  # the last: the datastore may be of no use afterwards
    )
)
