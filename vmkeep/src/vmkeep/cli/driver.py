"""``vmkeep driver``."""

from __future__ import annotations

import click

from backupcore import plugins
from vmkeep.cli import log, output
from vmkeep.cli.asked import Asked, common

__all__ = ["driver"]


@click.group(short_help="List the installed drivers.")
def driver() -> None:
    """List the installed drivers."""


@driver.command(name="list", short_help="List the installed drivers.")
@common
@click.pass_obj
def list_(asked: Asked) -> None:
    """List the installed drivers, and the packages that they come from. None is loaded."""
    log.start(asked.verbose)
    found = plugins.names(plugins.DRIVERS)
    if asked.json:
        output.document([{"name": name, "package": package} for name, package in found.items()])
        return
    output.table(("DRIVER", "PACKAGE"), list(found.items()))
