"""What `sources` lists."""

from __future__ import annotations

import threading
from dataclasses import replace

from backupcore.model import VM, SourceRef
from backupcore.testing import processes
from backupcore.testing.bench import Bench, Failed, Kept, NotApplicable
from backupcore.testing.given import Held
from backupcore.testing.life import DATE


def labels(bench: Bench) -> None:
    """sources() lists each backup once, with exactly the labels of its run."""
    vm = bench.vm()
    full = bench.keep(run=bench.run(vm))
    increment = bench.keep(run=bench.run(vm, parent=full.run.point, builds_on=[full.source]))
    other = bench.keep(run=bench.run(bench.vm("-odd, n\u00e4me=#1")))
    listed = bench.ours()
    for kept in (full, increment, other):
        mine = [one for one in listed if one.source == kept.source]
        if len(mine) != 1:
            raise Failed(f"a backup is listed {len(mine)} times")
        _compare(kept, dict(mine[0].labels))
        if mine[0].size is not None and mine[0].size < sum(one.size for one in kept.artifacts) // 2:
            raise Failed(f"a backup is listed with {mine[0].size} bytes")


def _compare(kept: Kept, found: dict[str, str]) -> None:
    wanted = replace(kept.run, date=DATE).labels  # the bench's hypervisor told it, as every hypervisor does
    if found != wanted:
        wrong = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        raise Failed(f"labels do not come back as they were given: {', '.join(wrong)}")


def only_complete(bench: Bench) -> None:
    """A backup under way is not listed, and none of its artifacts is restorable; a finished one is."""
    vm = bench.vm()
    run = bench.run(vm)
    artifacts = bench.artifacts()
    held = Held(artifacts[0], artifacts[0].size - 1, bench.place())
    done: list[Kept | BaseException] = []

    def work() -> None:
        try:
            done.append(bench.keep([held, *artifacts[1:]], run))
        except BaseException as error:  # noqa: BLE001 - handed over to the thread that waits
            done.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        if not processes.wait_for(lambda: held.reached or done):
            raise Failed("the driver did not read the disk within a minute")
        early = [] if done else bench.ours(vm)
    finally:
        held.let_go()
        thread.join()
    if isinstance(done[0], BaseException):
        raise done[0]
    if early:
        raise Failed("a backup is listed before all of it is stored")
    if [one.source for one in bench.ours(vm)] != [done[0].source]:
        raise Failed("a backup that is done is not listed")


def sources_of(bench: Bench) -> None:
    """sources_of() lists of a VM, whatever its name and whoever took them, all that sources() lists, and as that."""
    if not bench.open().implements("sources_of"):
        raise NotApplicable("the driver has no sources_of: all its sources are asked for")
    vm = bench.vm()
    full = bench.keep(run=bench.run(vm))
    bench.keep(run=bench.run(vm, parent=full.run.point, builds_on=[full.source]))
    bench.keep(run=bench.run(VM(uuid=vm.uuid, name="renamed"), installation="b" * 32))
    bench.keep(run=bench.run(bench.vm(vm.name)))
    gone = bench.keep(run=bench.run(vm))
    _of(bench, vm)
    with bench.context() as ctx:
        bench.open().delete([gone.source], ctx)
    _of(bench, vm)
    _of(bench, bench.vm())


def _of(bench: Bench, vm: VM) -> None:
    """Hold what is listed of a VM against what is listed of all. Others' backups may be in the answer."""
    wanted = {one.source: dict(one.labels) for one in bench.ours(vm)}
    with bench.context() as ctx:
        listed = bench.open().sources(ctx, vm.uuid)
    found: dict[SourceRef, dict[str, str]] = {}
    for one in listed:
        if one.source in found:
            raise Failed("sources_of lists a backup more than once")
        found[one.source] = dict(one.labels)
    if missing := wanted.keys() - found.keys():
        raise Failed(f"sources_of lacks {len(missing)} of the {len(wanted)} backups of a VM that sources lists")
    mine = {source for source, labels in found.items() if labels.get("vm") == vm.uuid}
    if mine - wanted.keys():
        raise Failed("sources_of lists as a backup of a VM what sources does not list as one")
    if any(found[source] != labels for source, labels in wanted.items()):
        raise Failed("sources_of gives a backup other labels than sources")
