"""Is a datastore still the place that the catalog knows? Asked before every verb, and before what cannot be taken back.

A disk that is not mounted, another one in its place, a bucket that was emptied, another prefix: each answers, and holds
nothing that is known. Nothing may be called damaged, deleted or lost, and nothing begun anew, because of that.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakSet

from backupcore.answers import checked_listed
from backupcore.context import Context
from backupcore.datastore import Datastore
from backupcore.errors import IncrementImpossible, IntegrityError, SourceNotFound, TargetUnavailable
from backupcore.hookspecs import hookimpl
from backupcore.model import Artifact, BackupRun, Listed
from backupcore.typed import typed
from vmkeep import full_state
from vmkeep.catalog import places
from vmkeep.catalog.database import Catalog

if TYPE_CHECKING:
    from vmkeep.workplace import Workplace

__all__ = ["SamePlace"]

log = logging.getLogger("vmkeep.datastore")


class SamePlace:
    """A plugin around a driver's hooks, which lets no verb through to a place that is not the one that is known.

    Where its identity is known, that must be found; where it is not, a source that the catalog knows must be listed.
    Where the catalog knows neither, the first backup that is recorded tells what the place is known by.
    """

    def __init__(self, place: Workplace, name: str) -> None:
        self._place = place
        self._name = name
        self._store: Datastore | None = None
        self._looked: WeakSet[Context] = WeakSet()
        self._lock = threading.RLock()
        self._asking = threading.local()

    def opened(self, store: Datastore) -> Datastore:
        """Take the datastore that this is a plugin of, and return it."""
        self._store = store
        return store

    # Around the hooks

    @hookimpl(wrapper=True)
    def prebackup(self, run: BackupRun, ctx: Context) -> Generator[None, object, object]:
        """The place may get its identity here, if this is its first backup.

        Where the run builds on something the driver begins nothing anew, and looks at the same time, unless this run
        has just looked, for its listing: some stores take half a second to say who they are. The answer is there before
        anything of the guest is touched.
        """
        if not run.builds_on:
            self.look(ctx, make=True)
            return (yield)
        with ThreadPoolExecutor(1, "same-place") as beside:
            looked = beside.submit(self._once, ctx, make=True)
            ctx.on_touch(looked.result)
            try:
                return (yield)
            except TargetUnavailable:
                looked.result()  # it says more
                raise
            except IncrementImpossible:  # what it builds on is gone: not if the whole place is
                self.look(ctx)
                raise

    @hookimpl(wrapper=True)
    def restore(self, ctx: Context) -> Generator[None, Sequence[Artifact], Sequence[Artifact]]:
        """A place without identities is only looked at where it lacks something: that takes a listing."""
        if self._datastore().implements("identity"):
            self._once(ctx)
        try:
            return (yield)
        except SourceNotFound:
            self.look(ctx)
            raise

    @hookimpl(wrapper=True)
    def delete(self, ctx: Context) -> Generator[None, bool, bool]:
        """Whatever is not there counts as deleted, so the place is looked at each time."""
        self.look(ctx, make=True)
        return (yield)

    @hookimpl(wrapper=True)
    def sources(self, ctx: Context) -> Generator[None, Iterable[Listed], Iterable[Listed]]:
        """A listing that has nothing of what is known is not believed before the place was seen again."""
        if getattr(self._asking, "now", False):
            return (yield)
        known = places.known(self._catalog(), self._name)
        if known:
            self._once(ctx)
        before = places.held(self._catalog(), self._name)
        listed = checked_listed((yield), ctx.check)
        # What is recorded or deleted meanwhile says nothing.
        held = before & places.held(self._catalog(), self._name)
        if held and held.isdisjoint(one.source.token for one in listed):
            self.look(ctx)
        return listed

    @hookimpl(wrapper=True)
    def sources_of(self, ctx: Context) -> Generator[None, Iterable[Listed], Iterable[Listed]]:
        """As `sources`, of one VM: that it lists none of the others says nothing, and the place is looked at then."""
        return (yield from self.sources(ctx))

    @hookimpl(wrapper=True)
    def check(self, ctx: Context) -> Generator[None, bool, bool]:
        """A place that answers and is another one is not well."""
        self.look(ctx)
        return (yield)

    @hookimpl(wrapper=True)
    def maintain(self, ctx: Context) -> Generator[None, bool, bool]:
        """Nothing is tidied up in another place."""
        self.look(ctx)
        return (yield)

    # Looking

    def _once(self, ctx: Context, *, make: bool = False) -> None:
        with self._lock:
            if ctx not in self._looked or (make and not places.known(self._catalog(), self._name)):
                self.look(ctx, make=make)

    def look(self, ctx: Context, *, make: bool = False) -> None:
        """TargetUnavailable unless this is the place that the catalog knows, or it knows none.

        With `make`, a place that has no identity gets one.
        """
        with self._lock:
            self._asking.now = True
            try:
                self._look(ctx, make=make)
            finally:
                self._asking.now = False
            self._looked.add(ctx)

    def _look(self, ctx: Context, *, make: bool) -> None:
        store = self._datastore()
        known = places.known(self._catalog(), self._name)
        if known and store.implements("identity"):
            self._require(known, store.identity(known.identity, ctx))
            return
        held = places.held(self._catalog(), self._name)
        if not held:
            if make:
                store.identity("", ctx, make=True)
            return
        listed = {one.source.token for one in store.sources(ctx)}
        if held.isdisjoint(listed):
            raise self._empty(held, listed)
        self._learn(store.identity("", ctx, make=make))

    def look_before_record(self, ctx: Context) -> None:
        """Look again, once a backup is stored: what it was stored in must still be there. The first one is known by it.

        A place without identities was looked at before the backup: a listing would tell no more now.
        """
        store = self._datastore()
        if not store.implements("identity"):
            return
        with self._lock:
            known = places.known(self._catalog(), self._name)
            found = store.identity(known.identity if known else "", ctx)
            if known:
                self._require(known, found)
            else:
                self._learn(found)

    @contextmanager
    def blamed(self, ctx: Context) -> Iterator[None]:
        """What the block says of stored bytes counts only where the place is still there."""
        try:
            yield
        except (IntegrityError, SourceNotFound):
            self.look(ctx)
            raise

    def _require(self, known: places.Known, found: str | None) -> None:
        if found == known.identity:
            return
        what = f"it is another one, {found}" if found else "nothing there says which one it is"
        raise TargetUnavailable(
            f"datastore {self._name} is not the place that its backups are in: expected {known.identity} (known since "
            f"{known.since:%Y-%m-%d}), but {what}",
            self._remedy(),
        )

    def _empty(self, held: Collection[str], listed: Collection[str]) -> TargetUnavailable:
        there = f"it lists {len(listed)} others" if listed else "it lists none at all"
        return TargetUnavailable(
            f"datastore {self._name} is not the place that its backups are in: of {len(held)} backups that the catalog "
            f"knows there it lists none ({there})",
            self._remedy(),
        )

    def _remedy(self) -> str:
        return (
            "Is it mounted, and are its options right? Nothing was changed. If this place is meant, or all backups in "
            f"it were removed: {typed('vmkeep datastore adopt', self._name)}"
        )

    def _learn(self, identity: str | None) -> None:
        if identity is None:
            return
        try:
            places.learn(self._place.catalog, self._name, identity)
        except full_state.UNWRITABLE as error:  # a restore reads, whatever becomes of the state folder
            log.debug("by what datastore %s is known is not written down: %s", self._name, error)

    # Methods, and no properties: whoever looks for a plugin's hooks would call those.

    def _datastore(self) -> Datastore:
        assert self._store is not None
        return self._store

    def _catalog(self) -> Catalog:
        return self._place.catalog_now
