"""kill -9 of the whole process: nothing half is ever restorable, and the next backup works."""

from __future__ import annotations

import pickle
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
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
        return processes.start("keep", replace(bench.target, tamper=None), artifacts, run, folder)
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
