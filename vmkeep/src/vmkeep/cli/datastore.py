"""``vmkeep datastore``."""

from __future__ import annotations

import sys

import click

from backupcore.errors import ConfigError
from backupcore.model import Image
from vmkeep import adopt_place
from vmkeep.catalog import images, places
from vmkeep.cli import output, progress
from vmkeep.cli.asked import Asked, common
from vmkeep.cli.documents import datastores as documents
from vmkeep.cli.exits import one_line
from vmkeep.cli.figures import date, size
from vmkeep.cli.opening import workplace

__all__ = ["datastore"]


@click.group(short_help="List, show, check and maintain datastores.")
def datastore() -> None:
    """List, show, check and maintain datastores."""


@datastore.command(name="list", short_help="List the configured datastores.")
@common
@click.pass_obj
def list_(asked: Asked) -> None:
    """List the configured datastores, with the images that the catalog knows in them. None is contacted."""
    place = workplace(asked)
    found = images.where(place.catalog_if_any)
    listed = []
    for name, options in place.config.datastores.items():
        here = [one for one in found if one.datastore == name]
        total = sum(increment.size for one in here for increment in one.increments)
        listed.append({"name": name, "driver": str(options["driver"]), "images": len(here), "size": total})
    if asked.json:
        output.document(listed)
        return
    rows = [(str(one["name"]), str(one["driver"]), str(one["images"]), size(int(str(one["size"])))) for one in listed]
    output.table(("DATASTORE", "DRIVER", "IMAGES", "SIZE"), rows, right=("IMAGES", "SIZE"))


@datastore.command(short_help="Show a datastore, and whether it is the place that is known.")
@click.argument("name")
@common
@click.pass_obj
def show(asked: Asked, name: str) -> None:
    """Show the datastore NAME: by what its place is known, and which images lie there.

    It is contacted: a place that is not the one that the catalog knows is told (exit code 5).
    """
    place = workplace(asked)
    store = place.datastore(name)
    with place.context() as ctx:
        place.same_place(name).look(ctx)
    known = places.known(place.catalog_now, name)
    found = [one for one in images.listed(place.catalog_now) if one.image.datastore == name]
    if asked.json:
        output.document(documents.shown(name, store.kind, known, found))
        return
    output.line(f"Datastore {name} ({store.kind})")
    if known:
        output.line(f"Identity {known.identity}, known since {date(known.since)}")
    elif store.implements("identity"):
        output.line("Identity: it gets one, or is known by its own, with the next backup")
    else:
        output.line("Identity: its driver knows none; it is told by the backups that it lists")
    absent = [one for one in found if one.image.state == "absent"]
    here = [one for one in found if one.image.state != "absent"]
    output.line(f"{len(here)} images, {size(sum(one.size for one in here))}")
    if absent:
        output.line(f"{len(absent)} images lie elsewhere: {', '.join(str(one.image.number) for one in absent)}")


@datastore.command(short_help="Say that a datastore is another place from now on.")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@common
@click.pass_obj
def adopt(asked: Asked, name: str, yes: bool) -> None:
    """Say that the place that the datastore NAME leads to now is the one that is meant, whatever was known before.

    For a new disk or bucket, one that has come back, or one that was emptied on purpose. Images that do not lie there
    stay in the catalog as absent: nothing is added to them, retention neither counts nor removes them. Should their
    place come back, adopt it again, or give it a name of its own. Nothing in the datastore but its marker is written.
    """
    place = workplace(asked)
    name = place.config.datastore(name)
    plan = adopt_place.plan(place, name)
    if not asked.json and not asked.quiet:
        _show_plan(plan)
    if not yes:
        _ask(plan)
    done = adopt_place.adopt(place, name)
    if asked.json:
        output.document(documents.adopted(done))
    elif not asked.quiet:
        output.line(f"datastore {name} is this place now{f': {done.identity}' if done.identity else ''}")


def _show_plan(plan: adopt_place.Adopted) -> None:
    was = f"{plan.before.identity}, known since {date(plan.before.since)}" if plan.before else "not known"
    output.line(f"Datastore {plan.name}: its place was {was}")
    output.line(f"The place that is there now: {plan.identity or 'has no identity yet'}")
    for what, these in (
        ("lie there", plan.sorted.here),
        ("do not lie there, and become absent", plan.sorted.absent),
        ("lie there that were known under another datastore's name, and follow", plan.sorted.moved),
    ):
        if these:
            output.line(f"{len(these)} images {what}: {', '.join(map(_told, these))}")


def _told(image: Image) -> str:
    return f"{image.number} ({image.vm.name})"


def _ask(plan: adopt_place.Adopted) -> None:
    if not sys.stdin.isatty():
        raise ConfigError("nothing was changed: there is no terminal to ask on", "Say --yes.")
    click.confirm(f"Is this the place that datastore {one_line(plan.name)} is to be?", abort=True, err=True)


@datastore.command(short_help="Does a datastore answer, and take the credentials?")
@click.argument("name")
@common
@click.pass_obj
def check(asked: Asked, name: str) -> None:
    """Contact the datastore NAME: does it answer, and take the credentials?"""
    place = workplace(asked)
    store = place.datastore(name)
    with place.context() as ctx:
        store.check(ctx)
        usage = store.usage(ctx)
    if asked.json:
        content = {"name": name, "driver": store.kind, "ok": True}
        output.document({**content, "used": usage.used, "total": usage.total, "free": usage.free})
    elif not asked.quiet:
        output.line(f"datastore {name} ({store.kind}) answers: {size(usage.used)} used, {size(usage.free)} free")


@datastore.command(short_help="Give back the room of deleted backups, and look for damage.")
@click.argument("name")
@common
@click.pass_obj
def maintain(asked: Asked, name: str) -> None:
    """Have the datastore NAME give back the room of what was deleted there, and look for damage.

    That may take long and lock others out, so no other command does it on the way. What it does in detail is the
    driver's: restic prunes and checks its repository, rsync needs nothing of the kind.
    """
    place = workplace(asked)
    store = place.datastore(name)
    with progress.shown(asked, name) as shown, place.context(shown) as ctx:
        place.same_place(name).look(ctx)  # also where the driver has nothing to do
        done = store.maintain(ctx)
    if asked.json:
        output.document({"name": name, "driver": store.kind, "maintained": done})
    elif not asked.quiet:
        output.line(f"datastore {name} ({store.kind}): " + ("maintained" if done else "needs no maintenance"))
