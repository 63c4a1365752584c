"""``vmkeep cancel``."""

from __future__ import annotations

import click

from vmkeep import cancel as work
from vmkeep.cli import output
from vmkeep.cli.asked import Asked, common
from vmkeep.cli.documents import runs as documents
from vmkeep.cli.figures import seconds
from vmkeep.cli.opening import workplace
from vmkeep.lock import Holder

__all__ = ["cancel"]


@click.command(short_help="Stop the running backup of a VM.")
@click.argument("vm")
@common
@click.pass_obj
def cancel(asked: Asked, vm: str) -> None:
    """Stop the running backup of VM (a name or a UUID), started in whichever shell, and wait until it has let go.

    The guest goes on, the datastore keeps no half backup, and the next backup builds on the last one that was done.
    """

    def waiting(holder: Holder) -> None:
        output.remark(asked, f"process {holder.process} ({holder.doing} of VM {holder.vm.name}) is told to stop")

    stopped = work.cancel(workplace(asked), vm, waiting=waiting)
    if asked.json:
        output.document(documents.cancel(stopped))
    elif not asked.quiet:
        ended = "had been done already" if stopped.state == "recorded" else "was stopped"
        output.line(f"{stopped.vm.name}: {stopped.doing} {ended} ({seconds(stopped.seconds)})")
        for line in stopped.did:
            output.line(f"  {line}")
