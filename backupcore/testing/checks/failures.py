"""What goes wrong on the giver's side, and what the user stops, leaves nothing behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

from backupcore.errors import BackupError, Cancelled, HypervisorError
from backupcore.model import VM, Artifact
from backupcore.testing import processes
from backupcore.testing.bench import KIB, MIB, Bench, Failed
from backupcore.testing.given import Failing, Held, Lying, Made, Watched, gone

SIZE = 2 * MIB + 100
_A_MOMENT = 0.2  # seconds


def _places() -> Iterator[tuple[str, int]]:
    """Where things happen: before the first byte, after it, halfway, at the last byte."""
    yield from (("byte 0", 0), ("byte 1", 1), ("half", SIZE // 2), ("the last byte", SIZE - 1))


def giver_fails(bench: Bench) -> None:
    """A read that fails, at byte 0, 1, half or the last, fails the backup with its own error and leaves nothing."""
    vm = bench.vm()
    with bench.nothing_of(vm, "a backup with a read that failed"):
        for place, at in _places():
            _fail(bench, vm, at, place)
    bench.there(bench.keep(run=bench.run(vm)))


def _fail(bench: Bench, vm: VM, at: int, place: str) -> None:
    artifacts = [Failing(Made("disk.vda.qcow2", SIZE), at), *bench.artifacts()[1:]]
    try:
        bench.keep(artifacts, bench.run(vm))
    except HypervisorError as error:
        if (error.message, error.hint) != (gone().message, gone().hint):
            raise Failed(f"the error of a read at {place} was changed: {error}") from error
    except BackupError as error:
        raise Failed(f"the HypervisorError of a read at {place} became {type(error).__name__}: {error}") from error
    else:
        raise Failed(f"a backup is done although a read failed at {place}")


def giver_lies(bench: Bench) -> None:
    """An artifact that ends early fails the backup; of one that is too long no more is kept than it promised."""
    vm = bench.vm()
    disk = Made("disk.vda.qcow2", SIZE)
    promised = SIZE - 64 * KIB - 1
    kept = None
    with bench.nothing_of(vm, "a failed backup of an artifact that has another length than it promised"):
        for size in (SIZE + 1, 2 * SIZE):
            with bench.refused(BackupError, what="a backup of an artifact that ends early"):
                bench.keep([Lying(disk, size), *bench.artifacts()[1:]], bench.run(vm))
        try:
            kept = bench.keep([Lying(disk, promised), *bench.artifacts()[1:]])
        except BackupError as error:
            bench.tell(error)
    if kept is None:
        return
    with bench.context() as ctx:
        found = bench.open().artifacts(kept.source, ctx)["disk.vda.qcow2"]
        with found.open() as file:
            data = file.read()
    if data != disk.read_at(0, promised):
        raise Failed("an artifact that had more bytes than it promised was kept with others than those promised")


def cancelled(bench: Bench) -> None:
    """A run that the user stops, at byte 0, 1, half or the last, ends soon, as Cancelled, and leaves nothing."""
    vm = bench.vm()
    disk, manifest = bench.artifacts(SIZE)
    with bench.nothing_of(vm, "a cancelled backup"):
        for place, at in list(_places())[:-1]:
            held = Held(disk, at, bench.place())
            _cancel(bench, vm, held, [held, manifest], place)
        held = Held(manifest, manifest.size - 1, bench.place())
        _cancel(bench, vm, held, [disk, held], "the last byte")
    bench.there(bench.keep(run=bench.run(vm)))


def _cancel(bench: Bench, vm: VM, held: Held, artifacts: Sequence[Artifact], place: str) -> None:
    ended = threading.Event()
    asked: list[float] = []
    with bench.context() as ctx:

        def stop() -> None:
            if processes.wait_for(lambda: held.reached or ended.is_set()):
                asked.append(time.monotonic())
                ctx.cancel()
            held.let_go()

        thread = threading.Thread(target=stop)
        thread.start()
        try:
            with bench.refused(Cancelled, what=f"a backup that is cancelled at {place}"):
                bench.keep(artifacts, bench.run(vm), ctx=ctx)
        finally:
            ended.set()
            thread.join()
    took = time.monotonic() - asked[0]
    if took > bench.target.patience:
        raise Failed(f"a backup that is cancelled at {place} ended {took:.0f} s later")


def cancelled_late(bench: Bench) -> None:
    """A run that the user stops after the last read ends soon, too: whatever the driver then waits for."""
    vm = bench.vm()
    artifacts = [Watched(one) for one in bench.all_kinds()]
    ended = threading.Event()
    asked: list[float] = []
    with bench.context() as ctx:

        def stop() -> None:
            if processes.wait_for(lambda: ended.is_set() or all(one.ended.is_set() for one in artifacts)):
                ended.wait(_A_MOMENT)
                asked.append(time.monotonic())
                ctx.cancel()

        thread = threading.Thread(target=stop)
        thread.start()
        try:
            with suppress(Cancelled):  # it may be done by then
                bench.keep(artifacts, bench.run(vm), ctx=ctx)
        finally:
            took = time.monotonic() - asked[0] if asked else 0.0
            ended.set()
            thread.join()
    if took > bench.target.patience:
        raise Failed(f"a backup that is cancelled after its last read ended {took:.0f} s later")


def no_child_survives(bench: Bench) -> None:
    """A backup leaves no process behind, whether it is done, fails or is cancelled; nor does a restore."""
    with bench.no_children("a backup that is done, and its restore"):
        bench.same(bench.keep())
    with bench.no_children("a backup that failed"), bench.refused(BackupError, what="a read that fails"):
        bench.keep([Failing(Made("disk.vda.qcow2", SIZE), SIZE // 2), *bench.artifacts()[1:]])
    with bench.no_children("a backup that was cancelled"):
        held = Held(Made("disk.vda.qcow2", SIZE), SIZE // 2, bench.place())
        _cancel(bench, bench.vm(), held, [held, *bench.artifacts()[1:]], "half")
