"""kill -9 in the middle of a backup: restic goes, too, its lock as well, nothing is listed, and the next run works."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from restic_odd import GatedArtifact

from backupcore.context import Context
from backupcore.disk.mountpoints import unmount_below
from backupcore.model import BackupRun, BytesArtifact
from backupcore_restic import Restic


def test_killed_midway(
    fresh: Restic,
    ctx: Context,
    make_run: Callable[..., BackupRun],
    make_artifacts: Callable[..., list[BytesArtifact]],
    wait_for: Callable[..., None],
    running: Callable[[str], list[int]],
    tmp_path: Path,
) -> None:
    script = tmp_path / "backup.py"
    script.write_text(
        "import pickle, sys\n"
        "sys.path[:] = pickle.load(sys.stdin.buffer)\n"
        "driver, artifacts, run, folder = pickle.load(sys.stdin.buffer)\n"
        "from backupcore.context import Context\n"
        "driver.backup(artifacts, run, Context(folder))\n"
    )
    folder = tmp_path / "killed"
    folder.mkdir()
    artifacts = [GatedArtifact("disk.vdb.qcow2", 4 << 20, tmp_path), *make_artifacts()]
    ours = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, start_new_session=True)
    assert ours.stdin
    try:
        pickle.dump(sys.path, ours.stdin)
        pickle.dump((fresh, artifacts, replace(make_run(), settings={}), folder), ours.stdin)
        ours.stdin.close()
        wait_for((tmp_path / "reached").exists)
        assert running(fresh.repository)
        assert any(Path(fresh.repository, "locks").iterdir())
    finally:
        ours.send_signal(signal.SIGKILL)
        ours.wait()
    wait_for(lambda: not running(fresh.repository))
    assert not any(Path(fresh.repository, "locks").iterdir())
    assert not any(Path(fresh.repository, "snapshots").iterdir())
    unmount_below(folder)

    run = make_run()
    fresh.prebackup(run, ctx)
    stored = fresh.backup(make_artifacts(1000), run, ctx)
    assert [one.source for one in fresh.sources(ctx)] == [stored.source]
