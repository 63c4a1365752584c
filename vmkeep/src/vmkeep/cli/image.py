"""``vmkeep image``."""

from __future__ import annotations

import sys

import click

from backupcore.errors import ConfigError
from backupcore.model import Image
from vmkeep import deletion
from vmkeep.catalog import images
from vmkeep.cli import documents, output
from vmkeep.cli.asked import Asked, common
from vmkeep.cli.exits import one_line
from vmkeep.cli.figures import date, size
from vmkeep.cli.opening import workplace
from vmkeep.cli.progress import shown
from vmkeep.naming import short

__all__ = ["image"]


@click.group(short_help="List, show and delete images (chains of backups).")
def image() -> None:
    """List, show and delete images. An ID is a number, a UUID, or a unique prefix of one (4 digits at least)."""


@image.command(name="list", short_help="List the images.")
@click.option("--vm", metavar="VM", help="Only those of this VM (a name or a UUID).")
@common
@click.pass_obj
def list_(asked: Asked, vm: str | None) -> None:
    """List every image in the catalog."""
    found = images.where(workplace(asked).catalog_if_any, vm=vm)
    if asked.json:
        output.document(documents.images(found))
        return
    rows = [
        (
            str(one.number),
            one.vm.name,
            one.datastore,
            one.state,
            str(len(one.increments)),
            size(sum(increment.size for increment in one.increments)),
            date(one.increments[-1].date if one.increments else None),
        )
        for one in found
    ]
    output.table(
        ("ID", "VM", "DATASTORE", "STATE", "INCREMENTS", "SIZE", "LAST"), rows, right=("ID", "INCREMENTS", "SIZE")
    )


@image.command(short_help="Show an image and its increments.")
@click.argument("reference", metavar="ID")
@common
@click.pass_obj
def show(asked: Asked, reference: str) -> None:
    """Show image ID and the table of its increments."""
    catalog = workplace(asked).catalog_if_any
    found = images.find(catalog, reference)
    if asked.json:
        output.document(documents.image(found, increments=True))
        return
    output.line(f"Image {found.number} ({found.uuid}), {found.state}{', pinned' if found.pinned else ''}")
    output.line(f"VM {found.vm.name} ({found.vm.uuid}) in datastore {found.datastore}")
    tokens = images.tokens(catalog)
    rows = [
        (
            str(one.id),
            str(one.pid),
            one.type.letter,
            size(one.size),
            date(one.date),
            short(one.source.token, tokens),
            one.consistency,
            one.reason or "; ".join(f"disk {disk.id}: {disk.reason}" for disk in one.disks if disk.reason),
        )
        for one in found.increments
    ]
    output.table(
        ("ID", "PID", "T", "SIZE", "DATE", "SOURCE", "CONSISTENCY", "WHY WHOLE"), rows, right=("ID", "PID", "SIZE")
    )


@image.command(short_help="Delete an image and its backups.")
@click.argument("reference", metavar="ID")
@click.option("--yes", is_flag=True, help="Do not ask.")
@common
@click.pass_obj
def delete(asked: Asked, reference: str, yes: bool) -> None:
    """Delete image ID: every backup in it, from its datastore and from the catalog."""
    place = workplace(asked)
    found = images.find(place.catalog_if_any, reference)
    if not yes:
        _ask(found)
    with shown(asked, f"image {found.number}") as progress:
        deleted, sources = deletion.delete(place, found.uuid, progress=progress)
    if asked.json:
        tokens = [source.token for source in sources]
        output.document({"id": deleted.number, "image_uuid": deleted.uuid, "deleted": tokens})
    elif not asked.quiet:
        output.line(f"image {deleted.number} of VM {deleted.vm.name} is deleted ({len(sources)} backups)")


def _ask(found: Image) -> None:
    if not sys.stdin.isatty():
        raise ConfigError(f"image {found.number} was not deleted: there is no terminal to ask on", "Say --yes.")
    count = len(found.increments)
    click.confirm(
        f"Delete image {found.number} of VM {one_line(found.vm.name)}, {count} backups, for good?",
        abort=True,
        err=True,
    )
