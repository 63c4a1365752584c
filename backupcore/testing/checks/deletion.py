"""Deleting."""

from __future__ import annotations

from backupcore.errors import SourceNotFound
from backupcore.testing.bench import Bench, Failed
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
