"""Deleting."""

from __future__ import annotations

from datetime import UTC, datetime

from backupcore.errors import Locked, SourceNotFound
from backupcore.model import SourceRef
from backupcore.testing.bench import Bench, Failed, Kept, NotApplicable
from backupcore.testing.life import digest


def deleted_for_all(bench: Bench) -> None:
    """What was deleted is gone at once for every object that has read it before: nothing comes from a cache."""
    kept, other = bench.keep(), bench.keep()
    stores = [bench.open(), bench.open()]
    for store in stores:
        with bench.context() as ctx:
            store.sources(ctx)
            for artifact in store.artifacts(kept.source, ctx).values():
                digest(artifact)
    with bench.context() as ctx:
        stores[0].delete([kept.source], ctx)
    for store in stores:
        with bench.context() as ctx:
            if kept.source in {one.source for one in store.sources(ctx)}:
                raise Failed("a deleted backup is still listed by a datastore that had read it before")
            with bench.refused(SourceNotFound, what="a deleted backup that was read before"):
                store.artifacts(kept.source, ctx)
    bench.same(other)


def delete(bench: Bench) -> None:
    """Of several, many at once, twice, none: what was deleted is gone, and nothing else is."""
    vm = bench.vm()
    kept = [bench.keep(run=bench.run(vm), artifacts=bench.artifacts(1000, seed)) for seed in range(3)]
    sources = [one.source for one in kept]
    with bench.context() as ctx:
        store = bench.open()
        store.delete([], ctx)
        store.delete([sources[0], sources[2]], ctx)
        bench.open().delete([sources[2], sources[0], sources[0]], ctx)
    for source in (sources[0], sources[2]):
        bench.gone(source, "a deleted backup")
    listed = {one.source for one in bench.ours(vm)}
    if listed != {sources[1]}:
        raise Failed(
            f"of three backups two were deleted; listed are {len(listed)}, or another than the one that is left"
        )
    bench.same(kept[1])
    with bench.context() as ctx:
        bench.open().delete(sources, ctx)
    if bench.ours(vm):
        raise Failed("a deleted backup is still listed")


def locks(bench: Bench) -> None:
    """locks() names those of the sources that delete would refuse, and until when, and no others."""
    if not bench.open().implements("locks"):
        raise NotApplicable("the driver has no locks: a lock is told by the delete that it refuses")
    vm = bench.vm()
    kept, gone = bench.keep(run=bench.run(vm)), bench.keep(run=bench.run(vm))
    absent = [SourceRef("0" * 32)]
    with bench.context() as ctx:
        try:
            bench.open().delete([gone.source], ctx)
            absent.append(gone.source)
        except Locked as error:  # a place that locks whatever is written
            bench.tell(error)
    _deletes(bench, kept, locked=kept.source in _locked(bench, kept, absent))
    if bench.target.lock is None:
        return
    held = bench.keep(run=bench.run(vm))
    with bench.target.lock(held.source):
        if held.source not in _locked(bench, held, absent):
            raise Failed("locks does not name a backup that the store locks")
        _deletes(bench, held, locked=True)
    if held.source in _locked(bench, held, absent):
        raise Failed("locks names a backup whose lock is over")
    _deletes(bench, held, locked=False)


def _locked(bench: Bench, kept: Kept, absent: list[SourceRef]) -> dict[SourceRef, datetime | None]:
    """What `locks` says of a backup that is there, with others that are not."""
    with bench.context() as ctx:
        found = bench.open().locks([*absent, kept.source], ctx)
    now = datetime.now(UTC)
    for source, until in found.items():
        if source in absent:
            raise Failed(f"locks names a source that is not there: {source}")
        if until is not None and until <= now:
            raise Failed(f"locks names a lock that was over at {until}")
    bench.same(kept)
    return found


def _deletes(bench: Bench, kept: Kept, *, locked: bool) -> None:
    """Delete, which must be refused as `locks` has said."""
    try:
        with bench.context() as ctx:
            bench.open().delete([kept.source], ctx)
    except Locked as error:
        bench.tell(error)
        if not locked:
            raise Failed(f"delete is refused by a lock that locks does not name: {error}") from error
        bench.same(kept)
        return
    if locked:
        raise Failed("delete deletes what locks calls locked")
