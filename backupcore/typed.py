"""Commands in messages and hints, as a user types them into a shell."""

from __future__ import annotations

import shlex

__all__ = ["typed"]


def typed(command: str, *values: object) -> str:
    """`command` as it stands, and `values` (names, paths) after it, each quoted where a shell would take it apart.

    Names of VMs may hold spaces and whatever else a shell knows: what is copied from a hint must do what the hint says.
    """
    return " ".join([command, *(shlex.quote(str(value)) for value in values)])
