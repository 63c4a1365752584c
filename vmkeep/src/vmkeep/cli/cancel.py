"""``vmkeep cancel``."""

from __future__ import annotations

import click

from vmkeep import cancel as work
from vmkeep.cli import exits, output
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
def cancel(asked: Asked, vm: str) -> int:
    """Stop the running backup of VM (a name or a UUID), started in whichever shell, and wait until it has let go.

    The guest goes on, the datastore keeps no half backup, and the next backup builds on the last one that was done.
    It returns within ten seconds. What has not ended by then, for a datastore that does not answer, is named (exit code
    3); the guest is let go of all the same.
    """

    def waiting(holder: Holder) -> None:
        output.remark(asked, f"process {holder.process} ({holder.doing} of VM {holder.vm.name}) is told to stop")

    stopped = work.cancel(workplace(asked), vm, waiting=waiting)
    if asked.json:
        output.document(documents.cancel(stopped))
    elif not asked.quiet:
        ended = "had been done already" if stopped.state == "recorded" else "was stopped"
        guest = "; the guest is let go of" if stopped.left else ""
        output.line(f"{stopped.vm.name}: {stopped.doing} {ended} ({seconds(stopped.seconds)}){guest}")
        for line in stopped.did:
            output.line(f"  {line}")
    for left in stopped.left:
        output.remark(asked, f"not ended: {left}")
    if stopped.left:
        output.remark(asked, stopped.next_step)
    return exits.WARNING if stopped.left else 0
