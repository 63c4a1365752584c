"""``vmkeep init``."""

from __future__ import annotations

import click

from vmkeep import example
from vmkeep.cli import log, output
from vmkeep.cli.asked import Asked, common
from vmkeep.config import default_path

__all__ = ["init"]


@click.command(short_help="Write a commented configuration.")
@click.option("--repository", metavar="PLACE", help="Set up a restic datastore there, with a new password file.")
@click.option("--datastore", metavar="NAME", default="backups", show_default=True, help="The name of that datastore.")
@common
@click.pass_obj
def init(asked: Asked, repository: str | None, datastore: str) -> None:
    """Write a commented configuration, to be read through and filled in. An existing one is never overwritten.

    With --repository it is complete: a restic datastore (a folder, or whatever restic takes) whose new, random
    password lies in a file beside the configuration. Nothing is made in the repository itself before the first backup.
    """
    log.start(asked.verbose)
    made = example.write(asked.config or default_path(), datastore=datastore, repository=repository)
    if asked.json:
        output.document({"config": str(made.config), "password_file": made.password and str(made.password)})
    elif not asked.quiet:
        output.line(f"{made.config} is written")
        if made.password:
            output.line(f"{made.password} is the key to the backups: keep a copy of it somewhere else")
        else:
            output.line("Fill in a datastore there.")
        output.line("Then: vmkeep check")
