"""kill -9 of the whole process: nothing half is ever restorable, and the next backup works."""

from __future__ import annotations

import pickle
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from backupcore.errors import BackupError
from backupcore.model import VM, Artifact, BackupRun, Outcome, RunState
from backupcore.testing import processes
from backupcore.testing.bench import MIB, Bench, Failed, Kept, NotApplicable
from backupcore.testing.given import Held

SIZE = 2 * MIB + 100


def killed(bench: Bench) -> None:
    """kill -9 at byte 0, half, or the end leaves nothing listed and no process, and the next backup works."""
    _require_other_process(bench)
    vm = bench.vm()
    disk, manifest = bench.artifacts(SIZE)
    with bench.nothing_of(vm, "a backup whose process was killed"):
        for at in (0, SIZE // 2):
            _kill(bench, vm, Held(disk, at, bench.place()), [manifest])
        _kill(bench, vm, Held(manifest, manifest.size - 1, bench.place()), [disk])
    bench.same(bench.keep(run=bench.run(vm)))


def _require_other_process(bench: Bench) -> None:
    if bench.target.kind is None:
        raise NotApplicable("the driver lives in this process only")


def _start(bench: Bench, artifacts: Sequence[Artifact], run: BackupRun, folder: Path) -> subprocess.Popen[bytes]:
    try:
        return processes.start("keep", bench.target.elsewhere, artifacts, run, folder)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise Failed(f"another process cannot open the target: {error}") from error


def _kill(bench: Bench, vm: VM, held: Held, rest: Sequence[Artifact]) -> None:
    run = bench.run(vm)
    with bench.context() as ctx:
        child = _start(bench, [held, *rest], run, ctx.folder)
        try:
            if not _begun(held, child):
                raise Failed("the driver did not read the artifacts within a minute")
            if child.poll() is not None:
                raise Failed(f"the backup ended early, in its own process: {_last_words(child)}")
            family = processes.below(child.pid)
        finally:
            child.kill()
            child.wait()
            _close(child)
        if left := processes.survivors(family, bench.target.patience):
            raise Failed(f"processes outlive the backup that was killed: {', '.join(map(str, left))}")
    _release(bench, run)


def _release(bench: Bench, run: BackupRun) -> None:
    """What the host tooling does when it finds a dead run: postbackup in a fresh process, here with a fresh driver."""
    with bench.context() as ctx:
        for error in bench.open().postbackup(run, Outcome(state=RunState.FAILED), ctx):
            bench.tell(error)
            raise Failed(f"postbackup of a run that was killed fails: {error}")


def manifest_last(bench: Bench) -> None:
    """kill -9 while an artifact is read whose name comes after the manifest's leaves nothing listed."""
    _require_other_process(bench)
    vm = bench.vm()
    with bench.nothing_of(vm, "a backup that was killed before all its artifacts were there"):
        for name, at in (("sums.vda", 0), ("vm.xml", len("vm.xml"))):
            artifacts = bench.all_kinds()
            late = next(one for one in artifacts if one.name == name)
            held = Held(late, at, bench.place())
            _kill(bench, vm, held, [one for one in artifacts if one is not late])
    bench.same(bench.keep(bench.all_kinds(), bench.run(vm)))


_KILLS = 6


def killed_deleting(bench: Bench) -> None:
    """kill -9 at any step of a delete leaves a backup whole or gone, and the same delete ends it then."""
    _require_other_process(bench)
    vm = bench.vm()
    other = bench.keep(bench.all_kinds(9), bench.run(vm))
    steps = _delete_elsewhere(bench, bench.keep(bench.all_kinds(), bench.run(vm)), 0)
    if steps is None:
        raise Failed("a delete in a process of its own was killed by somebody else")
    if not steps:
        raise NotApplicable("what it does to delete cannot be seen: no file is removed, no server or program asked")
    for at in sorted({1 + (steps - 1) * part // (_KILLS - 1) for part in range(_KILLS)}):
        kept = bench.keep(bench.all_kinds(at), bench.run(vm))
        _delete_elsewhere(bench, kept, at)
        bench.whole_or_gone(kept, f"a backup whose delete was killed at step {at} of {steps}")
        with bench.context() as ctx:
            bench.open().delete([kept.source], ctx)
        bench.gone(kept.source, "a backup whose delete was killed, and done again,")
    bench.same(other)


def _delete_elsewhere(bench: Bench, kept: Kept, at: int) -> int | None:
    """Delete in a process that is killed at that step: how many steps it took, None where it was killed."""
    with bench.context() as ctx:
        try:
            child = processes.start("delete", bench.target.elsewhere, [kept.source], ctx.folder, at)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise Failed(f"another process cannot open the target: {error}") from error
        with child:
            try:
                out, err = child.communicate(timeout=120)
            except subprocess.TimeoutExpired:
                child.kill()
                raise Failed("a delete in a process of its own was not done after two minutes") from None
    if child.returncode == -signal.SIGKILL:
        return None
    if child.returncode:
        raise Failed(f"a delete in a process of its own: {(err.decode(errors='replace').splitlines() or ['?'])[-1]}")
    return int(pickle.loads(out))  # noqa: S301 - from our own child, over a pipe


def killed_at_the_end(bench: Bench) -> None:
    """kill -9 while a backup is being published leaves either nothing or a complete backup."""
    _require_other_process(bench)
    vm = bench.vm()
    for delay in (0.0, 0.02, 0.1):
        *artifacts, manifest = bench.artifacts()
        held = Held(manifest, 0, bench.place())
        run = bench.run(vm)
        with bench.context() as ctx:
            child = _start(bench, [*artifacts, held], run, ctx.folder)
            try:
                reached = _begun(held, child)
                held.let_go()
                if not reached:
                    raise Failed("the driver did not read the manifest within a minute")
                time.sleep(delay)  # whenever it is: what must hold, holds at any time
            finally:
                family = processes.below(child.pid)
                child.kill()
                child.wait()
                _close(child)
            processes.survivors(family, bench.target.patience)  # one that ends late may publish late
        _release(bench, run)
        for one in bench.ours(vm):
            if one.labels.get("point") == run.point:
                _complete(bench, Kept(source=one.source, run=run, artifacts=(*artifacts, manifest)))


def _complete(bench: Bench, kept: Kept) -> None:
    try:
        bench.same(kept)
    except (Failed, BackupError) as error:
        raise Failed(f"a backup whose process was killed is listed, and not complete: {error}") from error


def _begun(held: Held, child: subprocess.Popen[bytes]) -> bool:
    """Wait until the driver has come to the held byte, or its process has ended."""
    return processes.wait_for(lambda: held.reached or child.poll() is not None)


def _last_words(child: subprocess.Popen[bytes]) -> str:
    words = child.communicate()[1].decode(errors="replace").strip().splitlines()
    return words[-1] if words else f"exit code {child.returncode}"


def _close(child: subprocess.Popen[bytes]) -> None:
    for pipe in (child.stdout, child.stderr):
        if pipe:
            pipe.close()
