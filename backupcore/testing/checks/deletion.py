"""Deleting."""

from __future__ import annotations

from backupcore.testing.bench import Bench, Failed


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
