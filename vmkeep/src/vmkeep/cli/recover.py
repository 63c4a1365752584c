"""``vmkeep recover``."""

from __future__ import annotations

import click

from vmkeep import recovery as work
from vmkeep.cli import exits, output
from vmkeep.cli.asked import Asked, common
from vmkeep.cli.documents import runs as documents
from vmkeep.cli.opening import workplace

__all__ = ["recover"]


@click.command(short_help="Put right what killed backups left behind.")
@click.argument("vm", required=False)
@common
@click.pass_obj
def recover(asked: Asked, vm: str | None) -> int:
    """Put right what killed backups of VM (a name or a UUID), or of every VM, left behind, and say what was done.

    A guest that is frozen or stopped goes on, jobs are ended; checkpoints, sockets, scratch files, mounts, processes
    and half uploads of dead runs go. A VM that is being backed up just now is left alone. A backup does the same for
    its own VM first.
    """
    found = work.recover(workplace(asked), vm)
    errors = [error for one in found for error in one.errors]
    if asked.json:
        output.document(documents.recovered(found))
    else:
        for one in found:
            for line in () if asked.quiet else one.did:
                output.line(f"{one.vm.name}: {line}")
            for error in one.errors:
                output.remark(asked, f"{one.vm.name}: {error.in_full}")
        if not asked.quiet and not any(one.did or one.errors for one in found):
            output.line("nothing to put right")
    return exits.code(errors[0]) if errors else 0
