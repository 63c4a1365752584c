"""Several at once: runs of one host, and hosts of one name that know nothing of each other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from backupcore.errors import BackupError, Busy, HypervisorError
from backupcore.model import VM, Outcome, RunState
from backupcore.testing import processes
from backupcore.testing.bench import MIB, Bench, Failed, Kept
from backupcore.testing.given import Failing, Held, Made

_THEIRS = "b" * 32


def _under_way(bench: Bench, *, vm: VM, installation: str = "a" * 32, seed: int) -> tuple[Held, Callable[[], Kept]]:
    made = Made("disk.vda.qcow2", MIB + seed, seed)
    held = Held(made, MIB // 2, bench.place())
    run = bench.run(vm, installation=installation)
    return held, lambda: bench.keep([held, *bench.artifacts(seed=seed)[1:]], run)


def _meet(readers: list[Held], jobs: list[Future[Kept]], what: str) -> None:
    if not processes.wait_for(lambda: all(one.reached for one in readers) or any(job.done() for job in jobs)):
        late = sum(not one.reached for one in readers)
        raise Failed(f"{what}: {late} of {len(readers)} had not begun to read after a minute")


def concurrent(bench: Bench) -> None:
    """Three backups at once, through one datastore object as through several, do not disturb each other."""
    started = [_under_way(bench, vm=bench.vm(), seed=seed) for seed in range(3)]
    with bench.threads(3) as pool:
        jobs = [pool.submit(work) for _, work in started]
        try:
            _meet([held for held, _ in started], jobs, "three backups at once")
        finally:
            for held, _ in started:
                held.let_go()
        kept = [job.result() for job in jobs]
    if len({one.source for one in kept}) != 3:
        raise Failed("backups that were made at once share a token")
    bench.same(*kept)
    store = bench.open()
    with bench.threads(3) as pool:
        again = [pool.submit(bench.keep, bench.artifacts(seed=seed), store=store) for seed in range(3)]
        bench.same(*[job.result() for job in again])


def two_hosts(bench: Bench) -> None:
    """What one host keeps, fails at, clears up and deletes leaves another's backups alone, also unfinished ones.

    Both have the same name, and back up the same VM.
    """
    vm = bench.vm("web")
    theirs = bench.keep(run=bench.run(vm, installation=_THEIRS))
    held, work = _under_way(bench, vm=vm, installation=_THEIRS, seed=7)
    with bench.threads(1) as pool:
        job = pool.submit(work)
        try:
            _meet([held], [job], "a backup of another host")
            mine = _busy_host(bench, vm)
        finally:
            held.let_go()
        late = job.result()
    bench.same(theirs, late, mine)


def _busy_host(bench: Bench, vm: VM) -> Kept:
    """A host that fails, clears up after itself, makes two backups and deletes one of them.

    That it must wait with deleting until the other one is done is a fair answer.
    """
    failed = bench.run(vm)
    try:
        bench.keep([Failing(Made("disk.vda.qcow2", MIB), MIB // 2), *bench.artifacts()[1:]], failed)
    except HypervisorError:
        pass
    except BackupError as error:
        raise Failed(f"a read that fails, beside a backup of another host: {error}") from error
    with bench.context() as ctx:
        errors = bench.open().postbackup(failed, Outcome(state=RunState.FAILED), ctx)
    if errors:
        raise Failed(f"postbackup, called once more: {errors[0]}")
    first, second = (bench.keep(run=bench.run(vm)) for _ in range(2))
    with bench.context() as ctx, suppress(Busy):
        bench.open().delete([first.source], ctx)
    return second
