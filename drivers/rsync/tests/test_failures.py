"""What real programs say when something is wrong, as the taxonomy; and that nothing is left behind."""

from __future__ import annotations

import fcntl
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from backupcore.context import Context
from backupcore.errors import (
    AccessDenied,
    BackupError,
    Cancelled,
    ConfigError,
    HypervisorError,
    IntegrityError,
    TargetFull,
    TargetUnavailable,
    from_os_error,
)
from backupcore.life import Life
from backupcore.model import BytesArtifact, SourceRef
from backupcore.options import build
from backupcore.testing import processes
from backupcore.testing.given import Failing, Held, Made
from backupcore_rsync import Rsync
from backupcore_rsync import driver as rsync_driver
from drivers.rsync.tests.kinds import SECRET, Kind, new_artifacts, new_run, over_ssh
from lab.servers import Sshd, free_port, rsync_daemon

DISK = 40 << 20
SLOW_ELSEWHERE = pytest.mark.parametrize(
    "kind",
    ["folder", *(pytest.param(name, marks=pytest.mark.soak) for name in ("host", "daemon"))],
    indirect=True,
)


def raises(error: type[BackupError], text: str, call: Callable[[], object]) -> BackupError:
    with pytest.raises(error, match=text) as caught:
        try:
            call()
        except OSError as plain:  # the core does the same
            raise from_os_error(plain, "the target") from plain
    assert SECRET not in f"{caught.value} {caught.value.hint}"
    return caught.value


def test_a_read_that_fails_fails_the_backup_with_its_own_error(kind: Kind, ctx: Context) -> None:
    broken = Failing(Made("disk.vdb.qcow2", 4 << 20), 3 << 20)
    raises(
        HypervisorError, "disk cannot be read", lambda: kind.driver().backup([broken, *new_artifacts()], new_run(), ctx)
    )
    assert kind.everything() == []


def test_the_guest_is_let_go_of_before_anything_is_tidied_up(kind: Kind, ctx: Context) -> None:
    there: list[list[str]] = []
    ctx.on_release(lambda: there.append(kind.everything()))
    broken = Failing(Made("disk.vdb.qcow2", 4 << 20), 3 << 20)
    with pytest.raises(HypervisorError):
        kind.driver().backup([broken, *new_artifacts()], new_run(), ctx)
    assert len(there) == 1
    assert there[0], "what it had stored is still there"
    assert kind.everything() == []


def test_a_clean_up_that_hangs_is_left_to_the_next_run(
    ssh_server: Sshd,
    tmp_path: Path,
    ctx: Context,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root = tmp_path / "target"
    root.mkdir()
    wrapper = tmp_path / "ssh"
    wrapper.write_text('#!/bin/sh\ncase "$*" in *"rm -f --"*) exec sleep 600;; esac\nexec ssh -F none "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setattr(rsync_driver, "CLEAN_UP", 0.5)
    run = new_run()
    broken = Failing(Made("disk.vdb.qcow2", 4 << 20), 3 << 20)
    hanging = build(Rsync, over_ssh(ssh_server, root) | {"ssh": str(wrapper)})
    raises(HypervisorError, "disk cannot be read", lambda: hanging.backup([broken, *new_artifacts()], run, ctx))
    assert "until the next backup of this VM from this host removes it" in caplog.text
    assert "not done within" in caplog.text
    assert list(root.glob("*/.*.part"))
    part = next(iter(root.glob("*/.*.part")))
    part.rename(str(part).replace(str(Life.own()), str(replace(Life.own(), started="1"))))  # its process has ended
    build(Rsync, over_ssh(ssh_server, root)).prebackup(run, ctx)
    ctx.touch()
    assert not list(root.glob("*/.*.part"))


@SLOW_ELSEWHERE
def test_cancelled_midway_leaves_nothing(kind: Kind, tmp_path: Path) -> None:
    held = Held(Made("disk.vdb.qcow2", DISK, every=100), DISK // 2, tmp_path)

    def cancel() -> None:
        if processes.wait_for(lambda: held.reached):
            ctx.cancel()
            processes.wait_for(lambda: len(processes.below()) < 2, 10)  # rsync is held in the kernel by its read
            held.let_go()

    (tmp_path / "run").mkdir(exist_ok=True)
    before = processes.below()
    with Context(tmp_path / "run") as ctx:  # until its end the connection to a host is kept
        thread = threading.Thread(target=cancel)
        thread.start()
        raises(Cancelled, "cancelled", lambda: kind.driver().backup([held, *new_artifacts()], new_run(), ctx))
        thread.join()
    assert processes.wait_for(lambda: processes.below() <= before)
    with Context(tmp_path / "run") as calm:
        run = new_run()
        kind.driver().prebackup(run, calm)
        assert processes.wait_for(lambda: not list(kind.driver().sources(calm)))
    assert kind.everything() == []
    assert held.reached


def test_a_restore_can_be_cancelled(kind: Kind, ctx: Context) -> None:
    source = kind.driver().backup(new_artifacts(DISK), new_run(), ctx).source
    disk = next(one for one in kind.driver().restore(source, ctx) if one.name == "disk.vda.qcow2")
    if kind.name != "host":
        ctx.cancel()
        if kind.name == "daemon":
            raises(Cancelled, "cancelled", disk.open)
        return  # a file of this host: the core looks between two reads
    with disk.open() as stream:
        assert stream.read(10)
        ctx.cancel()
        raises(Cancelled, "cancelled", stream.read)


@pytest.mark.parametrize(
    ("kind", "argument", "text"),
    [
        ("folder", "--exclude=nvram", "nvram is missing"),
        ("folder", "--max-size=99", "disk"),
        ("folder", "--dry-run", "is missing"),
        ("host", "--dry-run", "is missing"),
        ("daemon", "--dry-run", "is missing"),
    ],
    indirect=["kind"],
)
def test_an_argument_that_leaves_files_out_is_noticed(kind: Kind, ctx: Context, argument: str, text: str) -> None:
    driver = kind.driver(rsync_arguments=[argument])
    error = raises(IntegrityError, text, lambda: driver.backup(new_artifacts(), new_run(), ctx))
    assert "rsync_arguments" in error.hint
    assert kind.everything() == []


@pytest.mark.parametrize("kind", ["folder"], indirect=True)
def test_an_argument_that_rsync_does_not_know(kind: Kind, ctx: Context) -> None:
    driver = kind.driver(rsync_arguments=["--no-such"])
    raises(ConfigError, "unknown option", lambda: driver.backup(new_artifacts(), new_run(), ctx))
    assert kind.everything() == []


def left_behind(kind: Kind, vm: str, id_: str, writer: str) -> Path:
    """A folder with part of a backup, as a run of `writer` would have left it."""
    folder = kind.root / vm / (id_ if kind.name == "daemon" else f".{id_}.{writer}.part")
    folder.mkdir(parents=True)
    (folder / "disk.vda.qcow2").touch()
    if kind.name == "daemon":
        (folder / f".part.{writer}").touch()
    return folder


def test_what_this_installation_left_is_swept_and_nothing_else(kind: Kind, ctx: Context) -> None:
    """By its ID; what an older version began, by the host's name. A clone has the same name, and another ID."""
    run, driver = replace(new_run(), installation="a" * 32), kind.driver()
    mine, number = run.installation, "1" * 32
    own = Life.own()
    dead = replace(own, started="1")
    gone = [
        left_behind(kind, run.vm.uuid, digit * 32, f"{who}.{number}{life}")
        for digit, who, life in (
            ("1", mine, f".{dead}"),
            ("2", mine, f".{replace(own, boot='0' * 31 + '1')}"),
            ("3", run.host, f".{dead}"),
            ("4", mine, ""),
            ("5", run.host, ""),
        )
    ]
    for folder in gone[3:]:  # an older version's: no life in its name, and no movement
        for path in (*folder.iterdir(), folder):
            os.utime(path, (0, 0))
    for digit, who, life in (
        ("6", mine, f".{own}"),
        ("7", mine, f".{replace(dead, namespace='1')}"),
        ("8", run.host, f".{replace(own, boot='0' * 31 + '1')}"),  # another host may have this name
        ("9", "b" * 32, f".{dead}"),
        ("a", f"{run.host}-b", f".{dead}"),
        ("b", mine, ""),
        ("c", mine, ".x"),
    ):
        left_behind(kind, run.vm.uuid, digit * 32, f"{who}.{number}{life}")
    (kind.root / run.vm.uuid / ".x.part").mkdir()
    (kind.root / run.vm.uuid / f".{'d' * 32}.{mine}.{number}.{dead}.part").symlink_to("/")
    before = set(kind.everything())
    driver.prebackup(run, ctx)
    assert set(kind.everything()) == before, "as long as somebody else may work on this VM, nothing is removed"
    ctx.touch()
    swept = {str(folder.relative_to(kind.root)) for folder in gone}
    assert {name for name in before - set(kind.everything()) if name.count("/") == 1} == swept


def test_what_another_run_writes_is_left_alone(kind: Kind, ctx: Context, tmp_path: Path) -> None:
    run = replace(new_run(), installation="a" * 32)
    held = Held(Made("disk.vdb.qcow2", 8 << 20), 4 << 20, tmp_path)
    stored: list[SourceRef] = []
    first = threading.Thread(
        target=lambda: stored.append(kind.driver().backup([held, *new_artifacts()], run, ctx).source)
    )
    first.start()
    try:
        assert processes.wait_for(lambda: held.reached)
        with Context(tmp_path / "run") as other:
            kind.driver().prebackup(replace(new_run(run.vm.uuid), installation=run.installation), other)
            other.touch()
    finally:
        held.let_go()
        first.join()
    found = {one.name: one.size for one in kind.driver().restore(stored[0], ctx)}
    assert found["disk.vdb.qcow2"] == held.size


@pytest.mark.parametrize("kind", ["folder"], indirect=True)
def test_a_locked_folder_is_somebody_elses_work(kind: Kind, ctx: Context) -> None:
    run = replace(new_run(), installation="a" * 32)
    writer = f"{run.installation}.{'1' * 32}.{replace(Life.own(), started='1')}"
    folder = left_behind(kind, run.vm.uuid, "d" * 32, writer)
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    kind.driver().prebackup(run, ctx)
    ctx.touch()
    assert folder.exists()
    os.close(handle)
    kind.driver().prebackup(run, ctx)
    ctx.touch()
    assert not folder.exists()


class Meddling(BytesArtifact):
    """An artifact with whose reading the disk vanishes from the target."""

    def __init__(self, name: str, data: bytes, root: Path) -> None:
        super().__init__(name, data)
        self._root = root

    def read_at(self, offset: int, length: int) -> bytes:
        for path in self._root.rglob("disk.vda.qcow2"):
            path.unlink()
        return super().read_at(offset, length)


@pytest.mark.parametrize("kind", ["folder", "host"], indirect=True)
def test_a_backup_from_which_a_disk_has_vanished_is_not_published(kind: Kind, ctx: Context, tmp_path: Path) -> None:
    *artifacts, manifest = new_artifacts()
    driver = kind.driver()
    if kind.name == "folder":
        manifest = Meddling(manifest.name, b"{}", kind.root)
    else:
        wrapper = tmp_path / "ssh"
        lose = f'case "$*" in *"mv --"*) find "{tmp_path}" -name disk.vda.qcow2 -delete;; esac'
        wrapper.write_text(f'#!/bin/sh\n{lose}\nexec ssh -F none "$@"\n')
        wrapper.chmod(0o755)
        driver = kind.driver(ssh=str(wrapper))
    raises(IntegrityError, r"disk\.vda\.qcow2 is", lambda: driver.backup([*artifacts, manifest], new_run(), ctx))
    assert kind.everything() == []


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


@pytest.mark.parametrize("where", ["folder", "host", "daemon"])
def test_a_full_and_then_a_read_only_target(
    where: str, small_disk: Path, ctx: Context, ssh_server: Sshd, tmp_path: Path
) -> None:
    (small_disk / "target").mkdir()
    if where == "folder":
        check_full(Kind(where, small_disk / "target", {"target": f"{small_disk}/target"}), ctx, remount)
    elif where == "host":
        place = tmp_path / "over there"
        place.mkdir()
        ssh_server.run(f"mount -t tmpfs -o size=8m tmpfs '{place}' && mkdir '{place}/target'")
        check_full(
            Kind(where, place / "target", over_ssh(ssh_server, place / "target")),
            ctx,
            lambda root: ssh_server.run(f"mount -o remount,ro '{root.parent}'"),
        )
        ssh_server.run(f"umount -l '{place}'")
    else:
        with rsync_daemon(tmp_path, f"[vms]\npath = {small_disk}\nread only = no\n") as port:
            check_full(
                Kind(where, small_disk / "target", {"target": f"rsync://127.0.0.1:{port}/vms/target"}), ctx, None
            )


def remount(root: Path) -> object:
    return subprocess.run(["mount", "-o", "remount,ro", root.parent], check=True)


def check_full(kind: Kind, ctx: Context, make_read_only: Callable[[Path], object] | None) -> None:
    driver = kind.driver()
    source = driver.backup(new_artifacts(1000), new_run(), ctx).source
    error = raises(TargetFull, "(?i)no space left", lambda: driver.backup(new_artifacts(20 << 20), new_run(), ctx))
    assert "room" in error.hint
    assert [one.source for one in driver.sources(ctx)] == [source]
    assert driver.backup(new_artifacts(1 << 20), new_run(), ctx), "what did not fit has gone again"
    if make_read_only:
        make_read_only(kind.root)
        run = new_run()
        raises(AccessDenied, "(?i)read-only|permission|cannot be written", lambda: driver.prebackup(run, ctx))
        raises(AccessDenied, "(?i)read-only", lambda: driver.backup(new_artifacts(10), new_run(), ctx))
        raises(AccessDenied, "(?i)read-only", lambda: driver.delete([source], ctx))
        manifest = next(one for one in driver.restore(source, ctx) if one.name == "manifest.json")
        assert manifest.open().read() == b'{"format": 1}'


def test_a_target_that_is_not_there(kind: Kind, ctx: Context) -> None:
    driver = kind.driver(target=f"{kind.options['target']}/none")
    gone = SourceRef(f"0e9a2a1b-0000-4000-8000-000000000000.{'0' * 32}")
    for call in (
        lambda: driver.check(ctx),
        lambda: driver.prebackup(new_run(), ctx),
        lambda: list(driver.sources(ctx)),
        lambda: driver.restore(gone, ctx),
        lambda: driver.delete([gone], ctx),
        lambda: driver.usage(ctx),
    ):
        raises(TargetUnavailable, "(?i)no such file|no folder|no such folder", call)
    assert kind.everything() == []


@pytest.mark.soak  # a login that is refused is tried again for half a minute
def test_ssh_that_does_not_get_through(ssh_server: Sshd, tmp_path: Path, ctx: Context) -> None:
    kind = Kind("host", tmp_path, over_ssh(ssh_server, tmp_path))

    def check(error: type[BackupError], text: str, hint: str = "", **options: object) -> None:
        driver = kind.driver(**options)
        for call in (lambda: driver.check(ctx), lambda: list(driver.sources(ctx))):
            assert hint in raises(error, text, call).hint

    check(TargetUnavailable, "Connection refused", "Is it up", port=free_port())
    nobody = tmp_path / "nobody"
    nobody.touch()
    check(AccessDenied, "No ED25519 host key is known", "ssh-keyscan", known_hosts_file=str(nobody))
    changed = tmp_path / "changed"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    changed.write_text(f"[127.0.0.1]:{ssh_server.port} {(tmp_path / 'key.pub').read_text()}")
    check(AccessDenied, "REMOTE HOST IDENTIFICATION HAS CHANGED", "somebody", known_hosts_file=str(changed))
    check(AccessDenied, "Permission denied", "authorized_keys", identity_file=str(tmp_path / "key"))
    (tmp_path / "open").write_bytes(ssh_server.identity.read_bytes())
    (tmp_path / "open").chmod(0o644)
    check(AccessDenied, "(?i)unprotected private key", "chmod 600", identity_file=str(tmp_path / "open"))
    check(ConfigError, "rsync-of-old.*not found", "rsync_path", rsync_path="rsync-of-old")
    check(ConfigError, "no-such-ssh", "Install", ssh="no-such-ssh")
    # What the user adds himself counts: here he lets unknown hosts in.
    trusting = tmp_path / "trusting"
    driver = kind.driver(known_hosts_file=str(trusting), ssh="ssh -F none -o StrictHostKeyChecking=accept-new")
    assert driver.check(ctx)
    assert "ssh-ed25519" in trusting.read_text()


def test_a_daemon_that_refuses(daemon: tuple[int, Path], password_file: Path, tmp_path: Path, ctx: Context) -> None:
    port, module = daemon
    kind = Kind("daemon", module, {"target": "", "password_file": str(password_file)})

    def at(name: str, **more: object) -> object:
        return kind.driver(target=f"rsync://me@127.0.0.1:{port}/{name}", **more).check(ctx)

    wrong = tmp_path / "wrong"
    wrong.write_text("guess\n")
    wrong.chmod(0o644)
    raises(AccessDenied, "password file must not be other-accessible", lambda: at("vms", password_file=str(wrong)))
    wrong.chmod(0o600)
    assert "password_file" in raises(AccessDenied, "auth failed", lambda: at("vms", password_file=str(wrong))).hint
    raises(ConfigError, "Unknown module", lambda: at("nothing"))
    raises(ConfigError, "(?i)chdir failed", lambda: at("lost"))
    raises(AccessDenied, "read only", lambda: at("shut"))
    raises(
        TargetUnavailable,
        "Connection refused",
        lambda: kind.driver(target=f"rsync://127.0.0.1:{free_port()}/vms").check(ctx),
    )
    source = kind.driver(target=f"rsync://me@127.0.0.1:{port}/keeps").backup(new_artifacts(10), new_run(), ctx).source
    kept = kind.driver(target=f"rsync://me@127.0.0.1:{port}/keeps")
    raises(AccessDenied, "(?i)refuse.*delete", lambda: kept.delete([source], ctx))
    assert kept.restore(source, ctx)


def test_the_other_host_dies_in_the_middle(ssh_server: Sshd, tmp_path: Path, ctx: Context) -> None:
    kind = Kind("host", tmp_path / "target", over_ssh(ssh_server, tmp_path / "target"))
    kind.root.mkdir()
    held = Held(Made("disk.vdb.qcow2", DISK, every=100), DISK // 2, tmp_path)

    def kill() -> None:
        if processes.wait_for(lambda: held.reached):
            for pid, command in processes.commands().items():
                if "rsync --server" in command and os.path.realpath(f"/proc/{pid}/cwd").startswith(str(kind.root)):
                    os.kill(pid, 9)
            held.let_go()

    thread = threading.Thread(target=kill)
    thread.start()
    raises(TargetUnavailable, "backing up", lambda: kind.driver().backup([held, *new_artifacts()], new_run(), ctx))
    thread.join()
    assert kind.everything() == []


def test_a_vms_folder_that_leads_nowhere_is_told(tmp_path: Path, ctx: Context) -> None:
    """Put on another disk by a link, say, and that is not mounted: whoever tried on and on would never end."""
    run = new_run()
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / run.vm.uuid).symlink_to(tmp_path / "not mounted")
    with pytest.raises((BackupError, OSError), match="No such file or directory"):
        build(Rsync, {"target": str(tmp_path / "target")}).backup(new_artifacts(), run, ctx)
