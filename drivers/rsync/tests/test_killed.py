"""kill -9 in a backup: while its process lives another run leaves it alone, afterwards the next one sweeps it."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from backupcore.context import Context
from backupcore.model import BackupRun
from backupcore.testing.given import Held, Made
from backupcore.testing.processes import wait_for
from drivers.rsync.tests.kinds import Kind, new_artifacts, new_run

SCRIPT = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
driver, artifacts, run, folder = pickle.load(sys.stdin.buffer)
from backupcore.context import Context
with Context(folder) as ctx:
    driver.backup(artifacts, run, ctx)
"""


def sweep(kind: Kind, run: BackupRun, folder: Path) -> list[str]:
    """What is in the target after the beginning of another run of the same VM, by the same installation."""
    folder.mkdir(mode=0o700)
    with Context(folder) as ctx:
        kind.driver().prebackup(replace(new_run(run.vm.uuid), installation=run.installation), ctx)
        ctx.touch()
    return [name for name in kind.everything() if "/" in name]


@pytest.mark.parametrize("kind", ["folder", "host", "daemon"], indirect=True)
def test_killed_midway(kind: Kind, tmp_path: Path) -> None:
    run = replace(new_run(), installation="a" * 32, settings={})
    held = Held(Made("disk.vdb.qcow2", 8 << 20), 4 << 20, tmp_path)
    (tmp_path / "theirs").mkdir(mode=0o700)
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, start_new_session=True) as theirs:
        assert theirs.stdin
        try:
            pickle.dump(sys.path, theirs.stdin)
            pickle.dump((kind.driver(), [held, *new_artifacts()], run, tmp_path / "theirs"), theirs.stdin)
            theirs.stdin.close()
            assert wait_for(lambda: held.reached)
            assert any(
                name.endswith("disk.vda.qcow2") or "disk.vdb" in name for name in sweep(kind, run, tmp_path / "1")
            )
        finally:
            theirs.send_signal(signal.SIGKILL)
            theirs.wait()
            held.let_go()
    assert sweep(kind, run, tmp_path / "2") == []
