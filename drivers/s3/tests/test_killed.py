"""kill -9 in the middle of an upload: nothing is listed, the next run works and sweeps what is of its VM and host."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from s3_odd import GatedArtifact

from backupcore.context import Context
from backupcore.model import BackupRun, BytesArtifact
from backupcore_s3 import S3
from backupcore_s3.unfinished import is_dead, mark

SCRIPT = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
driver, artifacts, run, folder = pickle.load(sys.stdin.buffer)
from backupcore.context import Context
driver.backup(artifacts, run, Context(folder))
"""


def test_killed_midway(
    driver: S3,
    ctx: Context,
    make_run: Callable[..., BackupRun],
    make_artifacts: Callable[..., list[BytesArtifact]],
    wait_for: Callable[..., None],
    client: Any,
    bucket: str,
    tmp_path: Path,
) -> None:
    def uploads() -> list[Any]:
        found: list[Any] = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
        return found

    def unfinished() -> list[str]:
        listed = client.list_objects_v2(Bucket=bucket).get("Contents", ())
        return [one["Key"] for one in listed if one["Key"].endswith("_unfinished")]

    run = make_run()
    artifacts = [GatedArtifact("disk.vdb.qcow2", 50 << 20, 20 << 20, tmp_path), *make_artifacts()]
    ours = subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, start_new_session=True)
    assert ours.stdin
    try:
        pickle.dump(sys.path, ours.stdin)
        pickle.dump((driver, artifacts, run, tmp_path), ours.stdin)
        ours.stdin.close()
        wait_for(lambda: (tmp_path / "reached").exists() and len(uploads()) == 1)
        # While it lives nobody touches it, not even a run of the same VM on the same host.
        driver.prebackup(make_run(run.vm.uuid), ctx)
        ctx.touch()
        assert len(uploads()) == len(unfinished()) == 1
    finally:
        ours.send_signal(signal.SIGKILL)
        ours.wait()
    assert list(driver.sources(ctx)) == []

    driver.prebackup(make_run(), ctx)  # another VM
    ctx.touch()
    driver.prebackup(make_run(run.vm.uuid, host="host-b"), ctx)
    ctx.touch()
    assert len(uploads()) == len(unfinished()) == 1
    again = make_run(run.vm.uuid)
    driver.prebackup(again, ctx)
    ctx.touch()
    assert uploads() == unfinished() == []
    stored = driver.backup(make_artifacts(1000), again, ctx)
    assert [one.source for one in driver.sources(ctx)] == [stored.source]


def test_killed_between_the_manifest_and_the_end(
    driver: S3,
    ctx: Context,
    make_run: Callable[..., BackupRun],
    make_artifacts: Callable[..., list[BytesArtifact]],
    client: Any,
    bucket: str,
    keys: Callable[..., list[str]],
) -> None:
    run, artifacts = make_run(), make_artifacts(1000)
    source = driver.backup(artifacts, run, ctx).source
    folder = f"backups/{source.token.replace('.', '/')}"
    dead = {**json.loads(mark(run)), "started": "1"}
    client.put_object(Bucket=bucket, Key=f"{folder}/_unfinished", Body=json.dumps(dead).encode())
    assert [one.size for one in driver.sources(ctx)] == [sum(one.size for one in artifacts)]
    assert [one.name for one in driver.restore(source, ctx)] == [one.name for one in artifacts]
    driver.prebackup(make_run(run.vm.uuid), ctx)
    ctx.touch()
    assert keys(client, bucket) == [f"{folder}/{one.name}" for one in artifacts]


def test_who_is_dead(make_run: Callable[..., BackupRun]) -> None:
    run = make_run(host="here")
    alive = mark(run)
    assert not is_dead(alive, run)
    said = json.loads(alive)

    def dead(**other: object) -> bool:
        return is_dead(json.dumps({**said, **other}).encode(), run)

    assert dead(started="1"), "its number is another process's now"
    assert dead(pid=1 << 22)
    assert dead(boot="before")
    assert not dead(host="there", boot="before")
    assert not dead(namespace="pid:[1]", pid=1 << 22), "a container's, which we cannot see"
    assert not dead(boot="")
    for nonsense in (b"", b"{}", b"[]", b"{", json.dumps({**said, "pid": "x"}).encode()):
        assert not is_dead(nonsense, run)
    assert not is_dead(mark(replace(run, host="there")), run)


def test_who_is_dead_goes_by_the_installation_not_by_the_name(make_run: Callable[..., BackupRun]) -> None:
    run = replace(make_run(host="here"), installation="a" * 32)
    said = {**json.loads(mark(run)), "started": "1"}

    def dead(**other: object) -> bool:
        return is_dead(json.dumps({**said, **other}).encode(), run)

    assert dead(host="as it was called then")
    assert not dead(installation="b" * 32), "a clone has the same name"
    assert dead(installation="")
    assert not dead(installation="", host="there"), "an older version's: the name counts"
