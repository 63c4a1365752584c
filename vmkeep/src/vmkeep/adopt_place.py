"""Saying that a datastore is another place from now on: what that means for the images that the catalog has in it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from backupcore.context import Context
from backupcore.datastore import Datastore
from backupcore.errors import IntegrityError, TargetUnavailable
from vmkeep import lock
from vmkeep.catalog import images, places
from vmkeep.catalog.database import Catalog
from vmkeep.workplace import Workplace

__all__ = ["Adopted", "adopt", "plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopted:
    """What an adoption does, or would do. `identity` is what the place is known by, None where it has none (yet)."""

    name: str
    driver: str
    before: places.Known | None
    identity: str | None
    sorted: places.Sorted


def plan(place: Workplace, name: str) -> Adopted:
    """What `adopt` would do now. Nothing is written, neither here nor there."""
    with place.context() as ctx:
        return _look(place, place.any_place(name), place.catalog_if_any, ctx, make=False)


def adopt(place: Workplace, name: str) -> Adopted:
    """Have the datastore `name` be the place that it leads to now, and get an identity where it has none.

    Busy while one of the VMs that have images there is being backed up.
    """
    with ExitStack() as stack:
        for vm in {one.vm.uuid: one.vm for one in images.where(place.catalog) if one.datastore == name}.values():
            stack.enter_context(lock.vm_run(place.state, vm, "an adoption of its datastore"))
        ctx = stack.enter_context(place.context())
        done = _look(place, place.any_place(name), place.catalog, ctx, make=True)
        places.mean(place.catalog, name, done.identity, done.sorted)
    return done


def _look(place: Workplace, store: Datastore, catalog: Catalog, ctx: Context, *, make: bool) -> Adopted:
    # First whether it answers at all: a place that is away is no new one.
    store.check(ctx)
    identity = store.identity("", ctx, make=make)
    try:
        listed = list(store.sources(ctx))
    except TargetUnavailable:
        if identity is not None or not store.implements("identity"):
            raise
        listed = []  # all is well, and nothing was begun there yet: the first backup makes a repository
    try:
        before = places.known(catalog, store.name)
    except IntegrityError:  # what it is known by is damaged in the catalog, and written anew here
        before = None
    return Adopted(
        name=store.name,
        driver=store.kind,
        before=before,
        identity=identity,
        sorted=places.sort(catalog, store.name, listed, place.config.datastores),
    )
