"""Backups are read from one restic mount; what becomes of it, and of the reads, when something goes wrong."""

from __future__ import annotations

import logging
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import interrupted_mount
import pytest

from backupcore.context import Context
from backupcore.disk.mountpoints import mount_points, unmount_below
from backupcore.errors import Cancelled, IntegrityError, TargetUnavailable
from backupcore.model import Artifact, BackupRun, BytesArtifact, SourceRef
from backupcore_restic import Restic
from backupcore_restic.mounted import Mounted
from backupcore_restic.repository import Repository

Options = Callable[..., Restic]
Kept = tuple[SourceRef, list[BytesArtifact]]
Runs = Callable[..., BackupRun]
Artifacts = Callable[..., list[BytesArtifact]]
Running = Callable[[str], list[int]]


def disk_of(artifacts: list[Artifact]) -> Artifact:
    return next(one for one in artifacts if one.name == "disk.vda.qcow2")


def mounted_below(folder: Path) -> list[str]:
    return [path for path in mount_points() if path.startswith(f"{folder.resolve()}/")]


def left_of(ctx: Context) -> list[Path]:
    return [*ctx.folder.iterdir(), *map(Path, mounted_below(ctx.folder))]


@pytest.fixture
def big(fresh: Restic, ctx: Context, make_run: Runs, make_artifacts: Artifacts) -> Kept:
    """A backup whose disk lies in several packs."""
    artifacts = make_artifacts(48 << 20)
    return fresh.backup(artifacts, make_run(), ctx).source, artifacts


def test_any_part_can_be_read_by_several_threads(shared: Restic, kept: Kept, ctx: Context) -> None:
    disk, data = disk_of(shared.restore(kept[0], ctx)), kept[1][0].data
    copies = [disk, pickle.loads(pickle.dumps(disk))]
    chance = random.Random(1)
    places = [(chance.randrange(len(data)), chance.randrange(300_000)) for _ in range(200)]
    places += [(0, len(data)), (len(data) - 1, 100), (len(data), 5), (len(data) + 9, 5), (77, 0)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda place: copies[place[0] % 2].read_at(*place), places))
    assert found == [data[offset : offset + length] for offset, length in places]


def test_one_restic_serves_a_whole_run(
    fresh: Restic, ctx: Context, make_run: Runs, make_artifacts: Artifacts, running: Running
) -> None:
    kept = [(fresh.backup(given, make_run(), ctx).source, given) for given in (make_artifacts(5000) for _ in range(2))]
    processes = set()
    for source, given in kept:
        for artifact in fresh.restore(source, ctx):
            with artifact.open() as stream:
                assert stream.read() == next(one.data for one in given if one.name == artifact.name)
            processes |= set(running(fresh.repository))
    assert len(processes) == 1
    given = make_artifacts(6000)
    newer = fresh.backup(given, make_run(), ctx).source  # restic looks for new snapshots once a minute
    with disk_of(fresh.restore(newer, ctx)).open() as stream:
        assert stream.read() == given[0].data
    ctx.stack.close()
    assert left_of(ctx) == []
    assert not running(fresh.repository)


def test_what_was_never_read_mounts_nothing(shared: Restic, kept: Kept, ctx: Context, running: Running) -> None:
    assert kept[0] in [one.source for one in shared.sources(ctx)]
    assert left_of(ctx) == []
    assert not running(shared.repository)


def test_a_restic_that_cannot_mount_reads_all_the_same(
    options: Options, shared: Restic, kept: Kept, ctx: Context, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = tmp_path / "restic"
    old.write_text(
        '#!/bin/sh\ncase "$*" in *" mount "*) echo "unknown flag: --path-template" >&2; exit 1;; esac\n'
        f'exec {shutil.which("restic")} "$@"\n'
    )
    old.chmod(0o755)
    driver = options(shared.repository, binary=str(old))
    caplog.set_level(logging.INFO, logger="backupcore")
    for _ in range(2):
        with disk_of(driver.restore(kept[0], ctx)).open() as stream:
            assert stream.read() == kept[1][0].data
    assert caplog.text.count("not mounted: restic mount: unknown flag: --path-template") == 1
    assert left_of(ctx) == []


def test_a_small_read_of_a_merge_takes_along_what_follows(
    shared: Restic, kept: Kept, ctx: Context, running: Running
) -> None:
    disk, data = disk_of(shared.restore(kept[0], ctx)), kept[1][0].data
    merging = pickle.loads(pickle.dumps(disk))
    assert merging.read_at(1000, 10) == data[1000:1010]
    [process] = running(shared.repository)
    os.kill(process, signal.SIGKILL)
    assert merging.read_at(1010, 60_000) == data[1010:61_010]
    for offset in (999, 1000 + (256 << 10)):
        with pytest.raises(TargetUnavailable):
            merging.read_at(offset, 1)
    with pytest.raises(TargetUnavailable):
        disk.read_at(1010, 1)


def test_damage_beside_what_a_merge_reads_is_no_failure(fresh: Restic, big: Kept, ctx: Context) -> None:
    packs = [pack for pack in Path(fresh.repository, "data").rglob("*") if pack.is_file()]
    damaged = max(packs, key=lambda pack: pack.stat().st_size)
    damaged.chmod(0o600)
    damaged.write_bytes(bytes(byte ^ 1 for byte in damaged.read_bytes()))
    disk = disk_of(fresh.restore(big[0], ctx))
    whole: Mounted = disk.__getstate__()["_mounted"]  # type: ignore[index,call-overload]  # a plain dict
    merging: Mounted = pickle.loads(pickle.dumps(whole))

    def readable(mounted: Mounted) -> list[bool]:
        said, buffer = [], memoryview(bytearray(64 << 10))
        for offset in reversed(range(0, disk.size - len(buffer), 128 << 10)):  # backwards: what follows is never here
            try:
                said.append(mounted.read_into(f"{big[0].token}/{disk.name}", offset, buffer) > 0)
                assert buffer == big[1][0].data[offset : offset + len(buffer)]
            except OSError:
                said.append(False)
        return said

    found = readable(whole)
    assert False in found
    assert readable(merging) == found


@pytest.fixture
def interrupted(tmp_path: Path) -> Iterator[Path]:
    view = tmp_path / "view"
    view.mkdir()
    with subprocess.Popen([sys.executable, interrupted_mount.__file__, view]) as process:
        try:
            end = time.monotonic() + 30
            while str(view) not in mount_points():
                assert process.poll() is None, "it has ended"
                assert time.monotonic() < end, "it is not mounted"
                time.sleep(0.01)
            yield view
        finally:
            process.kill()  # a descriptor that a failed test holds would keep it alive
            unmount_below(tmp_path)


def test_a_read_that_was_broken_off_is_asked_for_again(interrupted: Path) -> None:
    mounted, buffer = Mounted(interrupted, near=True), memoryview(bytearray(interrupted_mount.DAMAGED))
    try:
        assert mounted.read_into("snapshot/disk", 0, buffer) == len(buffer)
        assert buffer == interrupted_mount.DATA[: len(buffer)]
        with pytest.raises(OSError, match="Input/output error"):
            mounted.read_into("snapshot/disk", interrupted_mount.DAMAGED, buffer)
    finally:
        mounted.close()


@pytest.mark.parametrize("own", ["", "GOGC=70", "GOMEMLIMIT=1GiB"])
def test_how_much_memory_restic_is_to_take(
    options: Options, fresh: Restic, ctx: Context, make_run: Runs, make_artifacts: Artifacts, tmp_path: Path, own: str
) -> None:
    given = make_artifacts(300_000)
    source = fresh.backup(given, make_run(), ctx).source
    seen, user = tmp_path / "seen", tmp_path / "environment"
    noting = tmp_path / "restic"
    noting.write_text(f'#!/bin/sh\necho "$GOGC,$GOMEMLIMIT, $*" >>{seen}\nexec {shutil.which("restic")} "$@"\n')
    noting.chmod(0o755)
    user.write_text(f"{own}\n")
    driver = options(fresh.repository, binary=str(noting), environment_file=str(user))
    driver.backup(given, make_run(), ctx)
    disk = disk_of(driver.restore(source, ctx))
    index = sum(file.stat().st_size for file in Path(fresh.repository, "index").iterdir())
    driver.backup([disk, *given[1:]], make_run(), ctx)  # as a flatten does
    cores = len(os.sched_getaffinity(0))
    due = {
        "": [",", f"50,{(120 << 20) + 16 * index}", f"50,{((40 + 8 * cores) << 20) + 16 * index}"],
        "GOGC=70": ["70,"] * 3,
        "GOMEMLIMIT=1GiB": [",1GiB"] * 3,
    }
    said = [line.rsplit(",", 1)[0] for line in seen.read_text().splitlines() if "mount" in line or " backup " in line]
    assert said == due[own]


def test_a_repository_far_away_gets_no_limit(options: Options) -> None:
    assert Repository(options("s3:https://nas/bucket")).sparing(1 << 20) == {"GOGC": "50"}


def test_a_killed_restic_fails_the_read(shared: Restic, kept: Kept, ctx: Context, running: Running) -> None:
    disk = disk_of(shared.restore(kept[0], ctx))
    elsewhere = pickle.loads(pickle.dumps(disk))
    assert disk.read_at(0, 10)
    assert elsewhere.read_at(0, 10)
    [process] = running(shared.repository)
    os.kill(process, signal.SIGKILL)
    with pytest.raises(TargetUnavailable, match="ended by signal 9"):
        disk.read_at(0, 2 << 20)
    with pytest.raises(TargetUnavailable, match="not mounted any more"):
        elsewhere.read_at(0, 2 << 20)
    with disk.open() as stream, pytest.raises(TargetUnavailable):
        stream.read()
    ctx.stack.close()
    assert left_of(ctx) == []
    with disk.open() as stream:
        assert stream.read() == kept[1][0].data, "by restic dump, once the mount is gone"


def test_a_restic_that_stands_still_is_cancelled(shared: Restic, kept: Kept, ctx: Context, running: Running) -> None:
    disk = disk_of(shared.restore(kept[0], ctx))
    assert disk.read_at(0, 10)
    os.kill(running(shared.repository)[0], signal.SIGSTOP)
    timer = threading.Timer(0.5, ctx.cancel)
    timer.start()
    with pytest.raises(Cancelled):
        disk.read_at(0, 3 << 20)
    timer.join()
    ctx.stack.close()
    assert left_of(ctx) == []
    assert not running(shared.repository)


def test_a_restic_that_stands_still_is_ended(
    options: Options, shared: Restic, kept: Kept, ctx: Context, running: Running
) -> None:
    driver = options(shared.repository, timeout=2)
    disk = disk_of(driver.restore(kept[0], ctx))
    os.kill(running(shared.repository)[0], signal.SIGSTOP)
    with pytest.raises(TargetUnavailable, match="neither read nor written for 2 s"):
        disk.read_at(0, 3 << 20)


def test_a_repository_that_goes_away_midway(
    options: Options, fresh: Restic, big: Kept, ctx: Context, tmp_path: Path
) -> None:
    driver = options(fresh.repository, timeout=3)
    disk = disk_of(driver.restore(big[0], ctx))
    assert disk.read_at(0, 10) == big[1][0].data[:10]
    Path(fresh.repository).rename(tmp_path / "elsewhere")
    with pytest.raises(TargetUnavailable, match=r"returned error, retrying|no such file"):
        for offset in range(0, disk.size, 8 << 20):
            disk.read_at(offset, 8 << 20)


def test_several_threads_hear_of_the_same_damage(fresh: Restic, big: Kept, ctx: Context) -> None:
    for pack in Path(fresh.repository, "data").rglob("*"):
        if pack.is_file() and pack.stat().st_size > 1 << 20:
            pack.chmod(0o600)
            pack.write_bytes(bytes(byte ^ 1 for byte in pack.read_bytes()))
    disk = disk_of(fresh.restore(big[0], ctx))

    def read(offset: int) -> str:
        with pytest.raises(IntegrityError) as caught:
            disk.read_at(offset, 8 << 20)
        return str(caught.value)

    with ThreadPoolExecutor(4) as pool:
        [said] = set(pool.map(read, range(0, disk.size, 8 << 20)))
    assert "ciphertext verification failed" in said
    with pytest.raises(IntegrityError, match="ciphertext"):
        pickle.loads(pickle.dumps(disk)).read_at(0, 1 << 20)


def test_no_link_of_a_repository_is_followed(fresh: Restic, ctx: Context, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    (folder / "disk.vda.qcow2").symlink_to("/etc/passwd")
    os.mkfifo(folder / "sums.vda")
    environment = {
        "RESTIC_REPOSITORY": fresh.repository,
        "RESTIC_PASSWORD_FILE": str(fresh.password_file),
        "RESTIC_CACHE_DIR": fresh.cache,
        "PATH": os.environ["PATH"],
    }
    subprocess.run(["restic", "backup", "-q", "."], env=environment, cwd=folder, check=True)
    [name] = [path.name for path in Path(fresh.repository, "snapshots").iterdir()]
    [manifest] = fresh.restore(SourceRef(name), ctx)
    assert manifest.name == "manifest.json"
    state = manifest.__getstate__()
    for other in ("disk.vda.qcow2", "sums.vda"):
        hostile = object.__new__(type(manifest))
        hostile.__dict__.update(state, _file=f"{name}/{other}")  # type: ignore[arg-type]  # a plain dict
        with pytest.raises((IntegrityError, TargetUnavailable)):
            hostile.read_at(0, 1)


def test_killed_midway(
    fresh: Restic, big: Kept, wait_for: Callable[..., None], running: Running, tmp_path: Path
) -> None:
    script = tmp_path / "restore.py"
    script.write_text(
        "import pickle, sys\n"
        "sys.path[:] = pickle.load(sys.stdin.buffer)\n"
        "driver, source, folder = pickle.load(sys.stdin.buffer)\n"
        "from backupcore.context import Context\n"
        "disk = next(one for one in driver.restore(source, Context(folder)) if one.name == 'disk.vda.qcow2')\n"
        "while disk.read_at(0, disk.size):\n"
        "    print('read', flush=True)\n"
    )
    folder = tmp_path / "killed"
    folder.mkdir()
    pipe = subprocess.PIPE
    ours = subprocess.Popen([sys.executable, script], stdin=pipe, stdout=pipe, start_new_session=True)
    assert ours.stdin
    assert ours.stdout
    try:
        pickle.dump(sys.path, ours.stdin)
        pickle.dump((fresh, big[0], folder), ours.stdin)
        ours.stdin.close()
        assert ours.stdout.readline() == b"read\n"
        assert running(fresh.repository)
        assert mounted_below(folder)
    finally:
        ours.send_signal(signal.SIGKILL)
        ours.wait()
    wait_for(lambda: not running(fresh.repository))
    unmount_below(folder)
    assert not mounted_below(folder)
    shutil.rmtree(folder)
