"""What a real restic says when something is wrong, as the taxonomy; and that nothing is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from restic_odd import BrokenArtifact, GatedArtifact, SlowArtifact

from backupcore.context import Context
from backupcore.errors import (
    AccessDenied,
    Busy,
    Cancelled,
    ConfigError,
    HypervisorError,
    IntegrityError,
    TargetFull,
    TargetUnavailable,
)
from backupcore.model import BackupRun, BytesArtifact, SourceRef
from backupcore_restic import Restic
from backupcore_restic import driver as restic_driver

Options = Callable[..., Restic]
Kept = tuple[SourceRef, list[BytesArtifact]]
Runs = Callable[..., BackupRun]
Artifacts = Callable[..., list[BytesArtifact]]


def names(folder: str, below: str) -> list[str]:
    return [path.name for path in Path(folder, below).iterdir()]


def test_a_wrong_password_is_no_missing_repository(
    options: Options, fresh: Restic, ctx: Context, make_run: Runs, tmp_path: Path
) -> None:
    (tmp_path / "wrong").write_text("guess\n")
    wrong = options(fresh.repository, password_file=str(tmp_path / "wrong"))
    before = {path: path.stat().st_mtime_ns for path in Path(fresh.repository).rglob("*")}
    for call in (lambda: wrong.prebackup(make_run(), ctx), lambda: wrong.check(ctx)):
        with pytest.raises(AccessDenied, match="wrong password") as caught:
            call()
        assert "password" in caught.value.hint
    assert {path: path.stat().st_mtime_ns for path in Path(fresh.repository).rglob("*")} == before


def test_a_wrong_password_is_told_before_an_increment_brings_the_guest_to_rest(
    options: Options, fresh: Restic, ctx: Context, make_run: Runs, make_artifacts: Artifacts, tmp_path: Path
) -> None:
    """What it builds on is looked for in the folder, for which no password is needed."""
    stored = fresh.backup(make_artifacts(), make_run(), ctx)
    (tmp_path / "wrong").write_text("guess\n")
    run = replace(make_run(builds_on=(stored.source,)), settings={"FS_FREEZE": "AGENT"})
    wrong = options(fresh.repository, password_file=str(tmp_path / "wrong"))
    wrong.prebackup(replace(run, settings={"FS_FREEZE": "NONE"}), ctx)
    ctx.touch()  # the half second would double such an increment, and the guest would not notice
    wrong.prebackup(run, ctx)
    with pytest.raises(AccessDenied, match="wrong password"):
        ctx.touch()
    fresh.prebackup(run, ctx)
    ctx.touch()


@pytest.mark.parametrize("how", [{"password_file": "/nowhere/at/all"}, {"password_command": "false"}])
def test_a_password_that_cannot_be_had(options: Options, pristine: Path, ctx: Context, how: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"(?i)resolving password"):
        options(pristine, **how).check(ctx)


@pytest.mark.parametrize("what", ["a FIFO", "/dev/zero", "10 GiB", "a folder", "nothing"])
def test_a_password_file_that_is_none_is_refused_before_restic_reads_it(
    options: Options, shared: Restic, make_run: Runs, ctx: Context, tmp_path: Path, what: str
) -> None:
    file = tmp_path / "odd"
    if what == "a FIFO":
        os.mkfifo(file)
    elif what == "a folder":
        file.mkdir()
    elif what == "/dev/zero":
        file.symlink_to(what)
    else:
        file.touch()
        os.truncate(file, 10 << 30 if what == "10 GiB" else 0)
    odd = options(shared.repository, password_file=str(file))
    stored = SourceRef("0" * 64)
    for ask in (odd.check, lambda ctx: odd.prebackup(make_run(builds_on=(stored,)), ctx)):
        with pytest.raises(ConfigError, match="the password file"):
            ask(ctx)


def test_a_password_command_that_hangs_is_given_up_with_its_children(
    options: Options,
    shared: Restic,
    ctx: Context,
    running: Callable[[str], list[int]],
    wait_for: Callable[..., None],
) -> None:
    started = time.monotonic()
    with pytest.raises(TargetUnavailable, match="the command sleep"):
        options(shared.repository, password_command="sleep 61", timeout=1).check(ctx)
    assert time.monotonic() - started < 8
    wait_for(lambda: not running(shared.repository))  # its child got the same signal, and may end after it


def test_no_repository_is_said_and_nothing_is_created(
    options: Options, ctx: Context, make_run: Runs, tmp_path: Path
) -> None:
    place = tmp_path / "none"
    driver = options(place)
    for call in (
        lambda: options(place, init=False).check(ctx),
        lambda: options(tmp_path / "none" / "deep").check(ctx),
        lambda: driver.restore(SourceRef("0" * 64), ctx),
        lambda: list(driver.sources(ctx)),
        lambda: driver.delete([SourceRef("0" * 64)], ctx),
        lambda: driver.prebackup(make_run(builds_on=(SourceRef("0" * 64),)), ctx),
        lambda: options(place, init=False).prebackup(make_run(), ctx),
    ):
        with pytest.raises(TargetUnavailable, match="none"):
            call()
    assert driver.check(ctx), "all is ready for the first backup, which creates it"
    assert not place.exists()


def test_no_repository_is_created_among_other_files(
    options: Options, ctx: Context, make_run: Runs, tmp_path: Path
) -> None:
    place = tmp_path / "used"
    place.mkdir()
    (place / "a file").touch()
    with pytest.raises(TargetUnavailable, match="holds files"):
        options(place).prebackup(make_run(), ctx)
    with pytest.raises(TargetUnavailable, match="does not exist"):
        options(tmp_path / "no" / "such").prebackup(make_run(), ctx)
    assert [path.name for path in place.iterdir()] == ["a file"]


def test_a_server_that_is_away(options: Options, ctx: Context, make_run: Runs) -> None:
    driver = options("rest:http://me:geh@eim@127.0.0.1:1/", timeout=6)  # restic 0.18 tries for 15 minutes
    for call in (lambda: driver.prebackup(make_run(), ctx), lambda: driver.check(ctx)):
        with pytest.raises(TargetUnavailable, match="refused") as caught:
            call()
        for text in (str(caught.value), caught.value.hint, repr(driver)):
            assert "eim" not in text


def test_a_check_does_not_take_longer_than_a_person_waits(
    options: Options, pristine: Path, ctx: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restic_driver, "CHECK", 1.0)
    started = time.monotonic()
    with pytest.raises(TargetUnavailable, match="the command sleep"):
        options(pristine, password_command="sleep 61", timeout=60).check(ctx)
    assert time.monotonic() - started < 20


def test_restic_is_not_installed(options: Options, pristine: Path, ctx: Context, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no-such-restic") as caught:
        options(pristine, binary="no-such-restic").check(ctx)
    assert "apt-get install restic" in caught.value.hint
    (tmp_path / "broken").write_text("no program\n")
    (tmp_path / "broken").chmod(0o755)
    with pytest.raises(ConfigError, match="could not be started"):
        options(pristine, binary=str(tmp_path / "broken")).check(ctx)


def test_a_repository_that_another_restic_holds(
    options: Options,
    fresh: Restic,
    ctx: Context,
    make_run: Runs,
    make_artifacts: Artifacts,
    wait_for: Callable[..., None],
) -> None:
    source = fresh.backup(make_artifacts(1000), make_run(), ctx).source
    environment = {
        "RESTIC_REPOSITORY": fresh.repository,
        "RESTIC_PASSWORD_FILE": str(fresh.password_file),
        "PATH": os.environ["PATH"],
    }
    other = subprocess.Popen(["restic", "check", "--no-cache"], env=environment, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: any(len(name) == 64 for name in names(fresh.repository, "locks")))
        other.send_signal(signal.SIGSTOP)
        assert names(fresh.repository, "locks")  # it had not ended
        with pytest.raises(Busy, match="locked exclusively by PID") as caught:
            fresh.prebackup(make_run(), ctx)
        assert "restic unlock" in caught.value.hint
        with pytest.raises(Busy):
            fresh.delete([source], ctx)
        # What is kept can be read all the same.
        manifest = next(one for one in fresh.restore(source, ctx) if one.name == "manifest.json")
        assert manifest.open().read() == b'{"format": 1}'
    finally:
        other.kill()
        other.wait()
    # Its lock outlives it, and stops nothing: the process is gone.
    assert names(fresh.repository, "locks")
    fresh.prebackup(make_run(), ctx)
    assert fresh.delete([source], ctx)
    assert names(fresh.repository, "locks") == []


def test_a_lock_is_waited_for(
    options: Options,
    fresh: Restic,
    ctx: Context,
    make_run: Runs,
    make_artifacts: Artifacts,
    wait_for: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    environment = {
        "RESTIC_REPOSITORY": fresh.repository,
        "RESTIC_PASSWORD_FILE": str(fresh.password_file),
        "PATH": os.environ["PATH"],
    }
    caplog.set_level("INFO", logger="backupcore")
    other = subprocess.Popen(["restic", "check", "--no-cache"], env=environment, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: any(len(name) == 64 for name in names(fresh.repository, "locks")))
        other.send_signal(signal.SIGSTOP)

        def end_it() -> None:
            wait_for(lambda: "waiting for at most 300 s" in caplog.text, 90)
            other.kill()
            other.wait()

        thread = threading.Thread(target=end_it)
        thread.start()
        waiting = options(fresh.repository, lock_wait=300)
        assert waiting.backup(make_artifacts(1000), make_run(), ctx)
        thread.join()
    finally:
        other.kill()
        other.wait()
    assert names(fresh.repository, "locks") == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place]
    made = subprocess.run(command, check=False, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"this user may not mount: {made.stderr}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_and_then_a_read_only_repository(
    options: Options, pristine: Path, small_disk: Path, ctx: Context, make_run: Runs, make_artifacts: Artifacts
) -> None:
    driver = options(shutil.copytree(pristine, small_disk / "repository"))
    source = driver.backup(make_artifacts(1000), make_run(), ctx).source
    with pytest.raises(TargetFull, match="no space left") as caught:
        driver.backup(make_artifacts(20 << 20), make_run(), ctx)
    assert "prune" in caught.value.hint
    assert [one.source for one in driver.sources(ctx)] == [source]

    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(AccessDenied, match="cannot be written"):
        driver.prebackup(make_run(), ctx)
    manifest = next(one for one in driver.restore(source, ctx) if one.name == "manifest.json")
    assert manifest.open().read() == b'{"format": 1}'


@pytest.mark.usefixtures("way")
def test_damage_raises_from_the_read_that_meets_it(
    fresh: Restic, ctx: Context, make_run: Runs, make_artifacts: Artifacts
) -> None:
    source = fresh.backup(make_artifacts(), make_run(), ctx).source
    biggest = max(Path(fresh.repository, "data").rglob("*"), key=lambda path: path.stat().st_size)
    biggest.chmod(0o600)
    with biggest.open("r+b") as pack:
        pack.seek(biggest.stat().st_size // 2)
        pack.write(b"not what was there")
    disk = next(one for one in fresh.restore(source, ctx) if one.name == "disk.vda.qcow2")
    with disk.open() as stream, pytest.raises(IntegrityError, match="ciphertext verification failed"):
        stream.read()


def test_a_read_that_fails_fails_the_backup_with_its_own_error(
    fresh: Restic, ctx: Context, make_run: Runs, make_artifacts: Artifacts
) -> None:
    run = make_run()
    broken = BrokenArtifact("disk.vdb.qcow2", 4 << 20)
    with pytest.raises(HypervisorError, match="disk is gone"):
        fresh.backup([broken, *make_artifacts()], run, ctx)
    assert names(fresh.repository, "snapshots") == []
    assert names(fresh.repository, "locks") == []
    assert fresh.backup(make_artifacts(1000), make_run(), ctx)


def test_a_restic_that_stands_still_is_ended(
    options: Options,
    fresh: Restic,
    ctx: Context,
    make_run: Runs,
    make_artifacts: Artifacts,
    running: Callable[[str], list[int]],
    tmp_path: Path,
) -> None:
    gated = GatedArtifact("disk.vdb.qcow2", 4 << 20, tmp_path)
    driver = options(fresh.repository, timeout=4)
    with pytest.raises(TargetUnavailable, match="neither read nor written for 4 s"):
        driver.backup([gated, *make_artifacts()], make_run(), ctx)
    assert (tmp_path / "reached").exists()
    assert names(fresh.repository, "snapshots") == []
    assert names(fresh.repository, "locks") == []
    assert running(str(tmp_path)) == []


@pytest.mark.parametrize("kind", [SlowArtifact, GatedArtifact], ids=["slow", "hanging"])
def test_cancelled_midway_leaves_nothing(
    kind: type[SlowArtifact | GatedArtifact],
    fresh: Restic,
    ctx: Context,
    make_run: Runs,
    make_artifacts: Artifacts,
    wait_for: Callable[..., None],
    running: Callable[[str], list[int]],
    tmp_path: Path,
) -> None:
    def cancel() -> None:
        wait_for((tmp_path / "reached").exists)
        ctx.cancel()

    started = time.monotonic()
    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(Cancelled):
        fresh.backup([kind("disk.vdb.qcow2", 400 << 20, tmp_path), *make_artifacts()], make_run(), ctx)
    thread.join()
    assert time.monotonic() - started < 40  # a hanging read gives up by itself after 60 s
    assert not running(fresh.repository)
    assert names(fresh.repository, "snapshots") == []
    assert names(fresh.repository, "locks") == []
    with pytest.raises(Cancelled):
        fresh.prebackup(make_run(), ctx)


@pytest.mark.usefixtures("way")
def test_a_restore_can_be_cancelled(shared: Restic, kept: Kept, ctx: Context) -> None:
    disk = next(one for one in shared.restore(kept[0], ctx) if one.name == "disk.vda.qcow2")
    with disk.open() as stream:
        assert stream.read(10)
        ctx.cancel()
        with pytest.raises(Cancelled):
            stream.read()


def test_a_wrapper_that_says_something_before_restic_does(
    options: Options, kept: Kept, shared: Restic, ctx: Context, make_run: Runs, tmp_path: Path
) -> None:
    wrapper = tmp_path / "restic"
    wrapper.write_text('#!/bin/sh\necho "[notice] using the wrapper"\necho\nexec restic "$@"\n')
    wrapper.chmod(0o755)
    driver = options(shared.repository, binary=str(wrapper))
    assert driver.check(ctx)
    driver.prebackup(make_run(), ctx)
    assert kept[0] in [one.source for one in driver.sources(ctx)]
    assert len(driver.restore(kept[0], ctx)) == len(kept[1])
    wrapper.write_text('#!/bin/sh\necho "sudo: a terminal is required"\n')
    with pytest.raises(IntegrityError, match="no JSON: sudo"):
        driver.sources(ctx)
