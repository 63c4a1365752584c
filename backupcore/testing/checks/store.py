"""A store that refuses, and one that does not answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

from backupcore.context import Context
from backupcore.errors import BackupError, Cancelled, ContractViolation
from backupcore.model import VM, Artifact
from backupcore.testing import processes
from backupcore.testing.bench import MIB, Bench, Failed, Kept, NotApplicable
from backupcore.testing.given import Held, Made

SIZE = 3 * MIB + 100
_A_MOMENT = 0.3  # seconds, in which the driver comes to wait for the store


def refused_writes(bench: Bench) -> None:
    """What the store refuses to keep or delete is told: no backup is done that is not there, none is half gone."""
    if bench.target.fail is None and bench.target.kind is None:
        raise NotApplicable("the target has no way to fail, and the driver lives in this process only")
    vm = bench.vm()
    if bench.target.kind is not None:
        _without_room(bench, vm)
    if bench.target.fail is None:
        return
    with bench.nothing_of(vm, "a backup that the store has refused"):
        with bench.target.fail():
            _refused(bench, bench.all_kinds(), vm, "from the begin")
        disk, *rest, manifest = bench.all_kinds()
        for held, place in (
            (Held(Made(disk.name, SIZE), SIZE // 2, bench.place()), "from the half of the disk on"),
            (Held(manifest, 0, bench.place()), "from the manifest on"),
        ):
            given = [held, *rest, manifest] if held.name == disk.name else [disk, *rest, held]
            _refused_from(bench, held, given, vm, place)
    kept = bench.keep(bench.all_kinds(), bench.run(vm))
    with bench.target.fail(), bench.context() as ctx:
        try:
            bench.open().delete([kept.source], ctx)
            deleted = True
        except BackupError as error:
            bench.tell(error)
            deleted = False
    if deleted:
        bench.gone(kept.source, "a backup that the driver says is deleted, though the store refused,")
    else:
        bench.whole_or_gone(kept, "a backup whose delete the store has refused")


def _without_room(bench: Bench, vm: VM) -> None:
    """In a process that may write no large file: either it fails, or all of it lies elsewhere and is there."""
    artifacts: list[Artifact] = [Made("disk.vda.qcow2", SIZE, 8), *bench.all_kinds()[1:]]
    run = bench.run(vm)
    with bench.context() as ctx:
        try:
            source = processes.call("keep within", bench.target.elsewhere, artifacts, run, ctx.folder, MIB)
        except RuntimeError as error:
            bench.told.append(str(error))
            source = None
        except Exception as error:
            raise Failed(f"another process cannot open the target: {error}") from error
    if source is None:
        if bench.ours(vm):
            raise Failed("a backup for which there was no room is listed")
        return
    bench.made.append(source)
    try:
        bench.same(Kept(source=source, run=run, artifacts=tuple(artifacts)))
    except (Failed, BackupError) as error:
        raise Failed(f"a backup is done although its files could not be written: {error}") from error


def _refused(bench: Bench, artifacts: list[Artifact], vm: VM, place: str) -> None:
    what = f"a backup to a store that refuses {place}"
    try:
        bench.keep(artifacts, bench.run(vm))
    except (ContractViolation, Cancelled) as error:
        raise Failed(f"{what}: {type(error).__name__} ({error})") from error
    except BackupError:
        return
    raise Failed(f"{what} is done")


def _refused_from(bench: Bench, held: Held, artifacts: list[Artifact], vm: VM, place: str) -> None:
    ended = threading.Event()
    assert bench.target.fail
    with ExitStack() as stack:
        failing = bench.target.fail()

        def begin() -> None:
            if processes.wait_for(lambda: held.reached or ended.is_set()) and not ended.is_set():
                stack.enter_context(failing)
            held.let_go()

        thread = threading.Thread(target=begin)
        thread.start()
        try:
            _refused(bench, artifacts, vm, place)
        finally:
            ended.set()
            thread.join()


def stalled(bench: Bench) -> None:
    """Whatever waits for a store that does not answer ends soon after the user has stopped it."""
    if bench.target.stall is None:
        raise NotApplicable("the target has no way to stall")
    vm = bench.vm()
    with bench.nothing_of(vm, "a backup that was cancelled while the store did not answer"):
        _stopped(bench, lambda ctx: _kept(bench, bench.all_kinds(), vm, ctx), "a backup")
        disk, *rest = bench.all_kinds()
        held = Held(Made(disk.name, SIZE), SIZE // 2, bench.place())
        _stopped(bench, lambda ctx: _kept(bench, [held, *rest], vm, ctx), "a backup, halfway", held)
    kept = bench.keep([Made("disk.vda.qcow2", 24 * MIB, 5), *bench.artifacts()[1:]], bench.run(vm))

    def read(ctx: Context) -> None:
        with bench.open().artifacts(kept.source, ctx)["disk.vda.qcow2"].open() as file:
            while file.read(MIB):
                pass

    _stopped(bench, read, "a restore")
    _stopped(bench, lambda ctx: bench.open().sources(ctx), "a listing")
    bench.same(kept)


def _kept(bench: Bench, artifacts: list[Artifact], vm: VM, ctx: Context) -> None:
    bench.keep(artifacts, bench.run(vm), ctx=ctx)


def _stopped(bench: Bench, work: Callable[[Context], object], what: str, held: Held | None = None) -> None:
    """Have the store stall (once `held` is reached), stop what waits for it, and look when that ends."""
    assert bench.target.stall
    errors: list[BaseException] = []
    ended = threading.Event()
    with bench.context() as ctx:

        def do() -> None:
            try:
                work(ctx)
            except BaseException as error:  # noqa: BLE001 - looked at by the thread that waits
                errors.append(error)
            finally:
                ended.set()

        thread = threading.Thread(target=do)
        with ExitStack() as stack:
            if held is None:
                stack.enter_context(bench.target.stall())
            thread.start()
            if held is not None:
                if not processes.wait_for(lambda: held.reached or ended.is_set()):
                    raise Failed("the driver did not read the disk within a minute")
                stack.enter_context(bench.target.stall())
                held.let_go()
            ended.wait(_A_MOMENT)
            asked = time.monotonic()
            ctx.cancel()
            in_time = ended.wait(bench.target.patience)
            took = time.monotonic() - asked
        thread.join()  # the store answers again
    if not in_time:
        raise Failed(f"{what} that waits for the store goes on {took:.0f} s after it was cancelled")
    for error in errors:
        bench.tell(error)
        if not isinstance(error, BackupError):
            raise Failed(f"{what} that is cancelled while the store does not answer: {error!r}")
