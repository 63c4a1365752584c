"""The options that every command takes, before or after its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from vmkeep.cli import stdout

__all__ = ["Asked", "common"]

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Asked:
    """What the user wants of every command: one JSON document, silence, details, another configuration."""

    config: Path | None = None
    json: bool = False
    quiet: bool = False
    verbose: int = 0


def _keep(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    # Given on either level it counts; the default of one level must not undo the other's.
    if value:
        setattr(ctx.ensure_object(Asked), str(param.name), value)


_PATH = click.Path(dir_okay=False, path_type=Path)
_OPTIONS = (
    click.option("-v", "--verbose", count=True, expose_value=False, callback=_keep, help="Say more; twice: all."),
    click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_keep, help="No progress, no remarks."),
    click.option("--json", is_flag=True, expose_value=False, callback=_keep, help="One JSON document on stdout."),
    click.option("--config", type=_PATH, expose_value=False, callback=_keep, help="The configuration file."),
)


def common(command: F) -> F:
    """Add the options that every command takes; they end up in the command's `Asked`.

    While it works nobody but itself writes to the standard output.
    """

    @wraps(command)
    def work(*arguments: Any, **named: Any) -> Any:
        with stdout.hidden():
            return command(*arguments, **named)

    made = cast("F", work)
    for option in _OPTIONS:
        made = option(made)
    return made
