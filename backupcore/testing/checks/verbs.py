"""The verbs: what they answer, and that they can be called again."""

from __future__ import annotations

from backupcore.errors import AccessDenied, ConfigError, IncrementImpossible, TargetUnavailable
from backupcore.model import Outcome, RunState, SourceRef, Usage
from backupcore.testing.bench import Bench, Failed, NotApplicable


def hooks(bench: Bench) -> None:
    """The driver opens: no required hook is missing, none is misspelt, and no hook's argument has a default."""
    bench.open()


def answers(bench: Bench) -> None:
    """check, sources, restore and delete answer as the contract says, and again when they are asked again."""
    kept = bench.keep()
    for store in (bench.open(), bench.open()):
        with bench.context() as ctx:
            store.check(ctx)
            first, second = ({one.source for one in store.sources(ctx)} for _ in range(2))
            if kept.source not in first & second:
                raise Failed("a backup is not listed each time")
            if list(store.artifacts(kept.source, ctx)) != list(store.artifacts(kept.source, ctx)):
                raise Failed("restore names other artifacts when it is asked again")
    with bench.context() as ctx:
        for _ in range(2):
            store.delete([kept.source], ctx)


def away(bench: Bench) -> None:
    """A datastore that does not answer opens, and is then told as what it is."""
    if bench.target.away is None:
        raise NotApplicable("the target names no options of a datastore that does not answer")
    store = bench.open(options=bench.target.away)
    expected = (TargetUnavailable, AccessDenied, ConfigError)
    with bench.context() as ctx:
        with bench.refused(*expected, what="check of a datastore that does not answer"):
            store.check(ctx)
        with bench.refused(*expected, what="sources of a datastore that does not answer"):
            store.sources(ctx)
    with bench.refused(*expected, what="a backup to a datastore that does not answer"):
        bench.keep(store=store)


def usage(bench: Bench) -> None:
    """usage() gives whole numbers of bytes, or None for what it does not know."""
    if not bench.open().implements("usage"):
        raise NotApplicable("the driver has no usage")
    bench.keep()
    with bench.context() as ctx:
        store = bench.open()
        for found in (store.usage(ctx), store.usage(ctx)):
            _sensible(found)


def _sensible(found: Usage) -> None:
    for name in ("used", "total", "free"):
        value = getattr(found, name)
        if value is not None and (type(value) is not int or value < 0):
            raise Failed(f"usage says {name}={value!r}")
    if found.total is not None and found.free is not None and found.free > found.total:
        raise Failed(f"usage says that more is free ({found.free}) than there is ({found.total})")
    if found.used == 0:
        raise Failed("usage says that nothing is used, although a backup is kept")


def builds_on(bench: Bench) -> None:
    """prebackup lets an increment pass whose chain is there, and IncrementImpossible names one that is gone."""
    if not bench.open().implements("prebackup"):
        raise NotApplicable("the driver has no prebackup: an increment on a chain that is gone would go on")
    vm = bench.vm()
    kept = bench.keep(run=bench.run(vm))
    second = bench.keep(run=bench.run(vm, parent=kept.run.point, builds_on=[kept.source]))
    with bench.context() as ctx:
        bench.open().delete([kept.source], ctx)
    for chain in ([kept.source, second.source], [SourceRef("0" * 32)]):
        with bench.refused(IncrementImpossible, what="prebackup of an increment whose full is gone"):
            bench.keep(run=bench.run(vm, parent=kept.run.point, builds_on=chain))
    bench.same(second)


def postbackup(bench: Bench) -> None:
    """postbackup can be called again, with a fresh driver, for a run that never began, and takes no backup away."""
    kept = bench.keep()
    for run, state in (
        (kept.run, RunState.RECORDED),
        (bench.run(), RunState.FAILED),
        (bench.run(), RunState.CANCELLED),
    ):
        for _ in range(2):
            with bench.context() as ctx:
                errors = bench.open().postbackup(run, Outcome(state=state), ctx)
            if errors:
                bench.tell(errors[0])
                raise Failed(f"postbackup, called again: {errors[0]}")
    bench.same(kept)
