"""``vmkeep datastore``."""

from __future__ import annotations

import click

from vmkeep.catalog import images
from vmkeep.cli import output
from vmkeep.cli.asked import Asked, common
from vmkeep.cli.figures import size
from vmkeep.cli.opening import workplace

__all__ = ["datastore"]


@click.group(short_help="List and check datastores.")
def datastore() -> None:
    """List and check datastores."""


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
