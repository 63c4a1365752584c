"""``vmkeep backup``."""

from __future__ import annotations

from functools import partial

import click

from vmkeep import backup as work
from vmkeep.cli import exits, output
from vmkeep.cli.asked import Asked, common
from vmkeep.cli.documents import runs as documents
from vmkeep.cli.figures import seconds, size
from vmkeep.cli.opening import workplace
from vmkeep.cli.progress import shown
from vmkeep.cli.retention import told

__all__ = ["backup"]


@click.command(short_help="Back up a VM.")
@click.argument("vm")
@click.option("-d", "--datastore", metavar="DATASTORE", help="Where to; needed if several are configured.")
@click.option("--reset", is_flag=True, help="Begin a new image with a full backup.")
@click.option("--dry-run", is_flag=True, help="Say what would be done; touch nothing.")
@common
@click.pass_obj
def backup(asked: Asked, vm: str, datastore: str | None, reset: bool, dry_run: bool) -> int:
    """Back up VM (a name or a UUID), running or not: an increment where that is possible, else a full."""
    place = workplace(asked)
    if dry_run:
        planned = work.plan(place, vm, datastore=datastore, reset=reset)
        if asked.json:
            output.document(documents.plan(planned))
        else:
            _show_plan(planned)
        return 0
    with shown(asked, vm) as progress:
        remark = partial(output.remark, asked)
        taken = work.take(place, vm, datastore=datastore, reset=reset, progress=progress, remark=remark)
    if asked.json:
        output.document(documents.backup(taken))
    elif not asked.quiet:
        _show(taken)
    for line in taken.missed:
        output.remark(asked, f"the backup is done, but {line}")
    for line in taken.found:
        output.remark(asked, f"the backup is done, but {line}")
    for warning in taken.warnings:
        output.remark(asked, f"the backup is done, but afterwards: {warning}")
    return exits.WARNING if taken.warnings or taken.missed or taken.found else 0


def _show(taken: work.Taken) -> None:
    recorded, increment = taken.recorded, taken.recorded.increment
    why = f" ({increment.reason})" if increment.reason else ""
    output.line(
        f"{recorded.run.vm.name}: {increment.type.value} backup{why}, image {taken.image}, increment {increment.id},"
        f" source {increment.source.token[:8]} in {recorded.run.datastore}"
    )
    stored = f", {size(recorded.stored)} added" if recorded.stored is not None else ""
    output.line(
        f"  {size(increment.size)}{stored}, {size(recorded.read)} read, {seconds(recorded.seconds)},"
        f" consistency {increment.consistency}, frozen {seconds(recorded.frozen_seconds)}"
    )
    for disk in increment.disks:
        if disk.reason:
            output.line(f"  disk {disk.id} whole: {disk.reason}")
    for left in recorded.left_out:
        if not left.missed:
            output.line(f"  not in it: {left.id}: {left.reason}")
    for action in taken.retention:
        if action.done or (action.what == "keep" and not action.error):
            output.line(f"  {told(action)}")


def _show_plan(planned: work.Planned) -> None:
    run = planned.run
    into = f"image {planned.image.number}" if planned.image else "a new image"
    why = f" ({run.reason})" if run.reason else ""
    output.line(f"{run.vm.name}: {run.type.value} backup{why} would go into {into} in {run.datastore}")
    for disk in planned.estimate.disks:
        how = "whole" if disk.whole else "what changed"
        why = f" ({disk.reason})" if disk.reason else ""
        amount = size(disk.bytes) if disk.bytes is not None else "size not known yet"
        output.line(f"  disk {disk.id}: {how}{why}, {amount}")
    for left in planned.estimate.left_out:
        output.line(f"  not in it: {left.id}: {left.reason}")
