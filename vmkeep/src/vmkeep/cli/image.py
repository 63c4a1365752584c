"""``vmkeep image``."""

from __future__ import annotations

import sys
from datetime import UTC, datetime

import click

from backupcore.errors import ConfigError, IntegrityError
from backupcore.model import Image
from vmkeep import deletion, vms
from vmkeep.catalog import corrections, holds, images
from vmkeep.cli import exits, output
from vmkeep.cli.asked import Asked, common
from vmkeep.cli.documents import images as documents
from vmkeep.cli.exits import one_line
from vmkeep.cli.figures import date, seconds, size
from vmkeep.cli.opening import workplace
from vmkeep.cli.progress import shown
from vmkeep.cli.retention import told
from vmkeep.naming import short

__all__ = ["image"]


@click.group(short_help="List, show, flatten, pin and delete images (chains of backups).")
def image() -> None:
    """List, show, flatten, pin and delete images.

    An ID is a number, a UUID, or a unique prefix of one (4 digits at least, with a letter among them).
    """


@image.command(name="list", short_help="List the images.")
@click.option("--vm", metavar="VM", help="Only those of this VM (a name or a UUID).")
@common
@click.pass_obj
def list_(asked: Asked, vm: str | None) -> None:
    """List every image in the catalog."""
    place = workplace(asked)
    catalog = place.catalog_if_any
    found = images.listed(catalog, vm=vm)
    if vm is not None and not found:
        vms.require_known(place, vm)
    held = holds.active(catalog, datetime.now(UTC))
    if asked.json:
        output.document(documents.images(found, held))
        return
    rows = [
        (
            str(one.image.number),
            one.image.vm.name,
            one.image.datastore,
            f"{one.image.state}, {_until(held[one.image.number])}" if one.image.number in held else one.image.state,
            str(one.count),
            size(one.size),
            date(one.last),
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
    place = workplace(asked)
    catalog = place.catalog_if_any
    found = images.find(catalog, reference)
    held = holds.active(catalog, datetime.now(UTC)).get(found.number)
    lost = corrections.lost(catalog, found)
    if asked.json:
        output.document(documents.image(found, held, lost))
        return
    output.line(f"Image {found.number} ({found.uuid}), {found.state}{', pinned' if found.pinned else ''}")
    output.line(f"VM {found.vm.name} ({found.vm.uuid}) in datastore {found.datastore}")
    if not place.installation_if_any.owns(found):
        whose = f"installation {found.installation}" if found.installation else "an installation that is not known"
        output.line(f"Written by {whose}{f' (host {found.host:.80})' if found.host else ''}; retention leaves it alone")
    if held:
        output.line(f"Nothing of it is deleted now: {holds.words(held)}")
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
            "lost: something else has removed it, or a part of it"
            if one.id in lost
            else one.reason or "; ".join(f"disk {disk.id}: {disk.reason}" for disk in one.disks if disk.reason),
        )
        for one in found.increments
    ]
    output.table(
        ("ID", "PID", "T", "SIZE", "DATE", "SOURCE", "CONSISTENCY", "WHY WHOLE"), rows, right=("ID", "PID", "SIZE")
    )


@image.command(short_help="Read an image back and hold it against its digests.")
@click.argument("reference", metavar="ID")
@click.option("--increment", type=click.IntRange(min=0), metavar="N", help="Only what increment N is made of.")
@click.option(
    "--sample", type=click.FloatRange(0, 100), default=100, metavar="PERCENT", help="Read that much of the data only."
)
@common
@click.pass_obj
def verify(asked: Asked, reference: str, increment: int | None, sample: float) -> int:
    """Read image ID back and compare it with the digests that were taken when the guest's disks were read.

    Where something is damaged (exit code 8) the next backup of the VM begins a new image. Where the datastore holds a
    later full that increments were merged into, and the catalog does not know it, nothing is damaged (exit code 3).
    """
    from vmkeep import verify as work  # noqa: PLC0415 - the data plane, which most commands here do not need

    place = workplace(asked)
    with shown(asked, f"image {reference}") as progress:
        result = work.verify(place, reference, number=increment, sample=sample / 100, progress=progress)
    if asked.json:
        output.document(documents.verify(result))
    elif not asked.quiet:
        rows = [(str(one.increment.id), size(one.read), one.problem or "well") for one in result.increments]
        output.table(("INCREMENT", "READ", "FOUND"), rows, right=("INCREMENT", "READ"))
    if result.ok:
        return 0
    if result.superseded:
        output.remark(asked, f"image {result.image.number} is not damaged, this catalog is behind its datastore")
        return exits.WARNING
    damaged = ", ".join(str(one.increment.id) for one in result.increments if one.problem)
    output.remark(asked, f"image {result.image.number} is damaged: increments {damaged} cannot be restored")
    return exits.CODES[IntegrityError]


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
        what = f"image {deleted.number} of VM {deleted.vm.name}"
        if deleted.state == "absent":
            output.line(f"{what} is forgotten; it lies elsewhere, and nothing was deleted there")
        else:
            output.line(f"{what} is deleted ({len(sources)} backups)")


@image.command(short_help="Merge the oldest increments into a new full.")
@click.argument("reference", metavar="ID")
@click.option("--to", type=click.IntRange(0), metavar="INCREMENT", help="The last one to merge; without it: all.")
@click.option("--verify-all", is_flag=True, help="Read all of the result back, whatever VERIFY_FLATTEN says.")
@common
@click.pass_obj
def flatten(asked: Asked, reference: str, to: int | None, verify_all: bool) -> int:
    """Merge the increments of image ID, from its full on, into a new full that keeps the ID and date of the last."""
    from vmkeep import flatten as work  # noqa: PLC0415 - the data plane, which no other command here needs

    place = workplace(asked)
    found = images.find(place.catalog_if_any, reference)
    with shown(asked, f"image {found.number}") as progress:
        done = work.flatten(place, found.uuid, to=to, everything=verify_all or None, progress=progress)
    if asked.json:
        output.document(documents.flatten(done))
    elif not asked.quiet:
        added = f", {size(done.stored)} added" if done.stored is not None else ""
        output.line(
            f"image {done.image.number}: increments {done.merged[0].id} to {done.full.id} are one full now,"
            f" {size(done.full.size)}{added}, {seconds(done.seconds)}"
        )
        if held := holds.active(place.catalog, datetime.now(UTC)).get(done.image.number):
            output.line(f"image {done.image.number}: what it was made from stays for now: {holds.words(held)}")
    for warning in done.warnings:
        output.remark(asked, warning)
    return exits.WARNING if done.warnings else 0


@image.command(short_help="Apply retention now: what KEEP_LAST lets go.")
@click.argument("vm", required=False)
@click.option("--dry-run", is_flag=True, help="Say what would go and why; touch nothing.")
@common
@click.pass_obj
def prune(asked: Asked, vm: str | None, dry_run: bool) -> int:
    """Let go of what the settings of VM (without it: of all VMs) do not keep, as after a backup.

    Nothing goes of a VM that this host does not have, and of images that another installation wrote. Where something
    stays that should go, without anybody having wanted that, the exit code is 3.
    """
    from vmkeep import retention  # noqa: PLC0415 - as above

    with shown(asked, "prune") as progress:
        plans, warnings = retention.prune(workplace(asked), vm, dry_run=dry_run, progress=progress)
    if asked.json:
        output.document(documents.prune(plans, warnings, dry_run=dry_run))
    elif not asked.quiet:
        for one in plans:
            if one.unknown:
                output.line(f"{one.vm.name} in {one.datastore}: all stays, its settings are not known: {one.unknown}")
            for action in one.actions:
                if not action.error:
                    output.line(f"{one.vm.name} in {one.datastore}: {told(action)}")
        if not any(one.actions or one.unknown or one.away for one in plans):
            output.line("nothing goes")
    for warning in warnings:
        output.remark(asked, warning)
    away = next((one.away for one in plans if one.away), None)
    if away:
        return exits.code(away)
    return exits.WARNING if warnings else 0


@image.command(short_help="Keep an image whatever retention says.")
@click.argument("reference", metavar="ID")
@common
@click.pass_obj
def pin(asked: Asked, reference: str) -> None:
    """Pin image ID: it is neither flattened nor deleted, and does not count for KEEP_LAST."""
    _pin(asked, reference, pinned=True)


@image.command(short_help="Let retention have an image again.")
@click.argument("reference", metavar="ID")
@common
@click.pass_obj
def unpin(asked: Asked, reference: str) -> None:
    """Take the pin off image ID."""
    _pin(asked, reference, pinned=False)


def _pin(asked: Asked, reference: str, *, pinned: bool) -> None:
    catalog = workplace(asked).catalog
    found = images.find(catalog, reference)
    images.pin(catalog, found, pinned=pinned)
    if asked.json:
        output.document({"id": found.number, "image_uuid": found.uuid, "pinned": pinned})
    elif not asked.quiet:
        output.line(f"image {found.number} of VM {found.vm.name} is {'pinned' if pinned else 'not pinned any more'}")


def _until(held: holds.Hold) -> str:
    return f"locked until {held.until:%Y-%m-%d}" if held.until else "not deletable"


def _ask(found: Image) -> None:
    if not sys.stdin.isatty():
        raise ConfigError(f"image {found.number} was not deleted: there is no terminal to ask on", "Say --yes.")
    count = len(found.increments)
    click.confirm(
        f"Delete image {found.number} of VM {one_line(found.vm.name)}, {count} backups, for good?",
        abort=True,
        err=True,
    )
