"""``vmkeep check``."""

from __future__ import annotations

import click

from vmkeep import findings
from vmkeep.cli import exits, log, output
from vmkeep.cli.asked import Asked, common

__all__ = ["check"]


@click.command(short_help="Is everything here that backups need?")
@click.option("--no-vm", is_flag=True, help="Try no backup of a VM made for it (it takes a few seconds).")
@common
@click.pass_obj
def check(asked: Asked, *, no_vm: bool) -> int:
    """Look at all that backups need: configuration, state folder, hypervisor, datastores.

    Every part is looked at. A live backup is tried on a VM made for it: paused, without an operating system, never
    defined, gone a few seconds later. The exit code is that of the first failure.
    """
    log.start(asked.verbose)
    answers = []
    for answer in findings.check(asked.config, try_vm=not no_vm):
        answers.append(answer)
        finding = answer.finding
        if not asked.json and not (asked.quiet and finding.ok):
            output.line(f"{'ok' if finding.ok else 'failed':<6}  {finding.subject}: {finding.detail}")
            if finding.hint and not finding.ok:
                output.line(f"  {finding.hint}")
    failures = [answer.error for answer in answers if answer.error]
    if asked.json:
        checks = [
            {
                "subject": answer.finding.subject,
                "ok": answer.finding.ok,
                "detail": answer.finding.detail,
                "hint": answer.finding.hint,
            }
            for answer in answers
        ]
        output.document({"ok": not failures, "checks": checks})
    return exits.code(failures[0]) if failures else 0
