"""``vmkeep datastore``."""

from __future__ import annotations

import click

from vmkeep.catalog import images
from vmkeep.cli import output, progress
from vmkeep.cli.asked import Asked, common
from vmkeep.cli.figures import size
from vmkeep.cli.opening import workplace

__all__ = ["datastore"]


@click.group(short_help="List, check and maintain datastores.")
def datastore() -> None:
    """List, check and maintain datastores."""


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
        done = store.maintain(ctx)
    if asked.json:
        output.document({"name": name, "driver": store.kind, "maintained": done})
    elif not asked.quiet:
        output.line(f"datastore {name} ({store.kind}): " + ("maintained" if done else "needs no maintenance"))
