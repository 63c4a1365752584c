"""A click group that imports a command's module when that command is used."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType

import click

from vmkeep import ctrl_c

__all__ = ["LazyGroup"]


class LazyGroup(click.Group):
    """`lazy` maps a command's name to where it is (``module:attribute``) and its line in the help."""

    def __init__(self, *, lazy: Mapping[str, tuple[str, str]], **rest: object) -> None:
        super().__init__(**rest)  # type: ignore[arg-type]  # click's own keyword arguments, passed through
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they were given: the most used first."""
        del ctx
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import it."""
        del ctx
        if cmd_name not in self.lazy:
            return None
        module, _, attribute = self.lazy[cmd_name][0].partition(":")
        command: click.Command = getattr(_imported(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing any."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in self.lazy.items()])


def _imported(module: str) -> ModuleType:
    if module in sys.modules:
        return sys.modules[module]
    gc.disable()  # modules stay: to look through them again and again while they come is a fifth of the start
    try:
        with ctrl_c.interrupted_at_once():
            return import_module(module)
    finally:
        gc.freeze()
        gc.enable()
