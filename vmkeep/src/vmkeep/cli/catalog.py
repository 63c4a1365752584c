"""``vmkeep catalog``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from backupcore.errors import ConfigError, IntegrityError
from backupcore.model import Image
from backupcore.typed import typed
from vmkeep import rebuild as work
from vmkeep import standing
from vmkeep.catalog import ownership
from vmkeep.cli import exits, output
from vmkeep.cli.asked import Asked, common
from vmkeep.cli.documents import catalogs as documents
from vmkeep.cli.exits import one_line
from vmkeep.cli.figures import date
from vmkeep.cli.opening import workplace
from vmkeep.cli.progress import shown
from vmkeep.needed import numbers

__all__ = ["catalog"]


@click.group(short_help="Hold the catalog against the datastores; make it anew from them.")
def catalog() -> None:
    """Hold this host's catalog against the datastores, or make it anew from them."""


@catalog.command(short_help="Have the catalog know what a datastore holds.")
@click.argument("datastore")
@click.option("--dry-run", is_flag=True, help="Say what would be added and changed; touch nothing.")
@common
@click.pass_obj
def rebuild(asked: Asked, datastore: str, dry_run: bool) -> int:
    """Find every image in DATASTORE from what lies there alone, and have the catalog know it.

    Images that it lacks are added. Those that it has get what they lack: newer increments, the full that some were
    merged into; what the datastore has lost is marked. The catalog of before is kept beside it. Nothing in the
    datastore is changed. Images that are added, or that get more, are closed: the next backup of their VM begins a new
    one.
    """
    place = workplace(asked)
    with shown(asked, f"datastore {datastore}") as progress:
        done = work.rebuild(place, datastore, dry_run=dry_run, progress=progress)
    if asked.json:
        output.document(documents.rebuild(done))
    elif not asked.quiet:
        if done.added:
            _table(done.added)
        were = "would be" if dry_run else "were"
        output.line(f"{len(done.added)} images {were} added; the catalog knew {done.known} sources already")
        for change in done.changed:
            output.line(f"image {change.before.number}, VM {change.before.vm.name}: {_change(change)}")
        if dry_run and done.changed:
            output.line("Nothing was changed (--dry-run).")
        if done.kept:
            output.line(f"The catalog of before is kept: {done.kept}")
        for owner, count in done.foreign.items():
            command = typed("vmkeep catalog take-over", done.datastore, "--from", owner)
            output.line(f"{count} of them are another installation's, and stay untouched. If it is gone: {command}")
        for remark in done.remarks:
            output.line(f"{remark.kind}: {remark.source}: {remark.why}")
    for one in done.busy:
        output.remark(asked, f"{one}; run it again")
    return exits.WARNING if done.busy else 0


def _change(change: work.Change) -> str:
    """What a rebuild did to an image, or would do."""
    told = []
    if change.added:
        told.append(f"{numbers(change.added)} added")
    if change.merged:
        told.append(f"{numbers(change.merged)} merged into the full {change.into}")
    if change.moved:
        told.append(f"{numbers(change.moved)}: another source")
    if change.lost:
        told.append(f"{numbers(change.lost)}: lost, something else has removed it or a part of it")
    if change.back:
        told.append(f"{numbers(change.back)}: there again")
    return "; ".join(told)


@catalog.command(name="take-over", short_help="Make another installation's backups this one's own.")
@click.argument("datastore")
@click.option(
    "--from", "who", required=True, metavar="ID", help="Whose: an installation, or a host where it had no ID."
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@common
@click.pass_obj
def take_over(asked: Asked, datastore: str, who: str, yes: bool) -> None:
    """Make the images in DATASTORE that installation ID has written this one's own, once that one is gone for good.

    Retention then lets go of them as of any other. What the catalog does not know yet, `vmkeep catalog rebuild` finds.
    Nothing in the datastore is changed.
    """
    place = workplace(asked)
    name = place.config.datastore(datastore)
    found = ownership.written_by(place.catalog_if_any, name, who, place.installation_if_any)
    if not asked.json and not asked.quiet:
        _table(found)
    if not yes:
        _ask(found, name)
    ownership.take_over(place.catalog, found, place.installation)
    if asked.json:
        output.document(documents.taken_over(name, found, place.installation.id))
    elif not asked.quiet:
        output.line(f"{len(found)} images are this installation's now")


def _table(images: Sequence[Image]) -> None:
    rows = [
        (
            str(one.number or "new"),
            one.vm.name,
            str(len(one.increments)),
            date(one.increments[0].date if one.increments else None),
            date(one.increments[-1].date if one.increments else None),
            one.host,
            one.installation,
        )
        for one in images
    ]
    columns = ("ID", "VM", "INCREMENTS", "FIRST", "LAST", "HOST", "INSTALLATION")
    output.table(columns, rows, right=("ID", "INCREMENTS"))


def _ask(found: Sequence[Image], datastore: str) -> None:
    if not sys.stdin.isatty():
        raise ConfigError("nothing was taken over: there is no terminal to ask on", "Say --yes.")
    click.confirm(
        f"Take over these {len(found)} images in {one_line(datastore)}? If their installation still works, both will "
        "delete what their own settings let go",
        abort=True,
        err=True,
    )


@catalog.command(short_help="What do the datastores lack, and what do they hold unused?")
@click.argument("datastore", required=False)
@common
@click.pass_obj
def check(asked: Asked, datastore: str | None) -> int:
    """Hold the catalog against DATASTORE (without it: all): what is missing there, what lies there unused.

    The exit code is 8 where something is missing, 3 where the catalog alone is behind: what it knows was merged into a
    later full. Data are not read: that is what vmkeep image verify does.
    """
    place = workplace(asked)
    with shown(asked, "catalog") as progress:
        found = work.check(place, datastore, progress=progress)
    if asked.json:
        output.document(documents.checked(found))
    elif not asked.quiet:
        for gone in found.missing:
            output.line(f"missing in {gone.datastore}: {gone.source}: {gone.what}")
        for merged in found.superseded:
            output.line(f"superseded in {merged.datastore}: {merged.source}: {merged.what}, went into a later full")
        for unused in found.unused:
            output.line(f"unused in {unused.datastore}: {unused.source}: {_told(unused)}")
        if not any((found.missing, found.superseded, found.unused, found.errors)):
            output.line("the catalog and the datastores agree")
    for name, error in found.errors.items():
        output.remark(asked, f"datastore {name} was not looked into: {error.in_full}")
    for name in dict.fromkeys(one.datastore for one in found.superseded):
        output.remark(asked, f"datastore {name} holds more than the catalog knows. {standing.remedy(name)}")
    if found.missing:
        return exits.CODES[IntegrityError]
    return next((exits.code(error) for error in found.errors.values()), exits.WARNING if found.superseded else 0)


def _told(unused: work.Unused) -> str:
    labels = unused.labels
    if not labels.get("point"):
        return "it has no labels of a backup"
    return (
        f"increment {labels.get('number', '?')} of image {labels.get('image', '?')}, VM {labels.get('vm', '?')},"
        f" {labels.get('date', '?')}"
    )
