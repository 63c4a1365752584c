"""How often another host is logged in to, and what its account may say on the way."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from backupcore.context import Context
from backupcore.errors import AccessDenied, BackupError, ConfigError, TargetUnavailable
from backupcore.model import SourceRef
from backupcore.options import build
from backupcore.testing.processes import wait_for
from backupcore_rsync import Rsync, programs
from drivers.rsync.tests.kinds import new_artifacts, new_run, over_ssh
from lab.servers import Sshd, rsync_daemon, silent, sshd

SPECIAL = Callable[..., Sshd]


@pytest.fixture
def special(tmp_path: Path) -> Iterator[SPECIAL]:
    """An sshd of the test's own: with further settings, and with a command that its key is for."""
    with ExitStack() as servers:

        def start(settings: str = "", command: str = "") -> Sshd:
            folder = tmp_path / "sshd"
            folder.mkdir()
            server = servers.enter_context(sshd(folder, settings))
            if command:
                key = (folder / "user.pub").read_text()
                (folder / "authorized_keys").write_text(f'command="{command}" {key}')
            return server

        yield start


@pytest.fixture
def root(tmp_path: Path) -> Path:
    place = tmp_path / "target"
    place.mkdir()
    return place


def whole_life(driver: Rsync, ctx: Context) -> SourceRef:
    """A backup, read back, and another one that builds on it."""
    run = new_run()
    driver.prebackup(run, ctx)
    ctx.touch()
    source = driver.backup(new_artifacts(1000), run, ctx).source
    for artifact in driver.restore(source, ctx):
        with pickle.loads(pickle.dumps(artifact)).open() as stream:
            assert len(stream.read()) == artifact.size
    driver.prebackup(new_run(run.vm.uuid, builds_on=(source,)), ctx)
    assert [one.source for one in driver.sources(ctx)] == [source]
    return source


def test_a_run_logs_in_once(ssh_server: Sshd, root: Path, ctx: Context) -> None:
    driver = build(Rsync, over_ssh(ssh_server, root))
    before = ssh_server.logins
    source = whole_life(driver, ctx)
    driver.delete([source], ctx)
    driver.usage(ctx)
    assert ssh_server.logins == before + 1


def test_a_server_that_takes_one_session_a_login(special: SPECIAL, root: Path, ctx: Context) -> None:
    whole_life(build(Rsync, over_ssh(special("MaxSessions 1\n"), root)), ctx)


def test_a_users_own_way_of_sharing_connections_stays(ssh_server: Sshd, root: Path, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(f"Host *\nControlMaster auto\nControlPath {tmp_path}/own\nControlPersist 60\n")
    driver = build(Rsync, over_ssh(ssh_server, root) | {"ssh": f"ssh -F {config}"})
    before = ssh_server.logins
    try:
        for number in "12":
            (tmp_path / number).mkdir(mode=0o700)
            with Context(tmp_path / number) as ctx:
                driver.check(ctx)
                assert not list((tmp_path / number).glob("ssh-*"))
        assert ssh_server.logins == before + 1
    finally:
        subprocess.run([*ssh_server.client, "-S", f"{tmp_path}/own", "-O", "exit", "127.0.0.1"], check=True)


SCRIPT = """
import pickle, sys, time
sys.path[:] = pickle.load(sys.stdin.buffer)
driver, folder = pickle.load(sys.stdin.buffer)
from backupcore.context import Context
driver.check(Context(folder))
print("checked", flush=True)
time.sleep(600)
"""


def test_the_connection_ends_with_a_process_that_is_killed(ssh_server: Sshd, root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    ours = subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert ours.stdin
    assert ours.stdout
    pickle.dump(sys.path, ours.stdin)
    pickle.dump((build(Rsync, over_ssh(ssh_server, root)), folder), ours.stdin)
    ours.stdin.close()
    assert ours.stdout.readline()
    assert list(folder.glob("ssh-*"))
    ours.send_signal(signal.SIGKILL)
    ours.wait()
    ours.stdout.close()
    assert wait_for(lambda: not list(folder.glob("ssh-*")))


def test_a_login_that_is_refused_is_tried_again(
    ssh_server: Sshd, root: Path, ctx: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a firewall does that counts them."""
    monkeypatch.setattr(programs, "PAUSES", (0.1, 0.1))
    wrapper = tmp_path / "ssh"
    refuse = (
        f'case "$*" in *" -G "*) exec ssh -F none "$@";; esac\necho x >> "{tmp_path}/tries"\n'
        f'[ $(wc -l < "{tmp_path}/tries") -gt $(cat "{tmp_path}/refused") ] || '
        '{ echo "ssh: connect to host nas port 22: Connection refused" >&2; exit 255; }\n'
    )
    wrapper.write_text(f'#!/bin/sh\n{refuse}exec ssh -F none "$@"\n')
    wrapper.chmod(0o755)
    (tmp_path / "refused").write_text("2")
    driver = build(Rsync, over_ssh(ssh_server, root) | {"ssh": str(wrapper)})
    with pytest.raises(TargetUnavailable, match="refused"):
        driver.check(ctx)
    whole_life(driver, ctx)
    (tmp_path / "refused").write_text("100")
    (tmp_path / "again").mkdir()
    with Context(tmp_path / "again") as other, pytest.raises(TargetUnavailable, match="refused"):
        driver.prebackup(new_run(), other)


def test_a_daemon_that_takes_one_connection_at_a_time(tmp_path: Path, root: Path, ctx: Context) -> None:
    module = f"[vms]\npath = {root}\nread only = no\nmax connections = 1\nlock file = {tmp_path}/lock\n"
    with rsync_daemon(tmp_path, module) as port:
        driver = build(Rsync, {"target": f"rsync://127.0.0.1:{port}/vms"})
        driver.check(ctx)
        whole_life(driver, ctx)


@pytest.mark.parametrize(
    ("command", "error", "text"),
    [
        ("/usr/sbin/nologin", ConfigError, "runs no commands there .*not available"),
        ("internal-sftp", ConfigError, "runs no commands there .*sftp"),
        ("exit 1", ConfigError, r"runs no commands there \(exit code 1\)"),
        ('echo Welcome; eval \\"$SSH_ORIGINAL_COMMAND\\"', ConfigError, "prints something at its start: Welcome"),
    ],
)
def test_an_account_that_takes_no_backups(
    special: SPECIAL, root: Path, ctx: Context, command: str, error: type[BackupError], text: str
) -> None:
    driver = build(Rsync, over_ssh(special(command=command), root))
    with pytest.raises(error, match=text) as caught:
        driver.check(ctx)
    assert "SFTP" in caught.value.hint or "startup files" in caught.value.hint


def test_a_banner_is_no_reason(special: SPECIAL, root: Path, ctx: Context, tmp_path: Path) -> None:
    banner = tmp_path / "banner"
    banner.write_text("Unauthorised access is not permitted.\nPermission denied to all others\n")
    server = special(f"Banner {banner}\n")
    driver = build(Rsync, over_ssh(server, root / "none"))
    with pytest.raises(TargetUnavailable, match="no such folder"):
        driver.check(ctx)
    # Also where the user wants to see it.
    loud = build(Rsync, over_ssh(server, root / "none") | {"ssh": "ssh -F none -o LogLevel=INFO"})
    with pytest.raises(TargetUnavailable, match="no such folder"):
        loud.check(ctx)


def test_a_terminal_and_a_command_of_the_users_configuration(
    ssh_server: Sshd, root: Path, ctx: Context, tmp_path: Path
) -> None:
    config = tmp_path / "config"
    config.write_text("Host *\nRequestTTY force\nRemoteCommand tmux attach\n")
    whole_life(build(Rsync, over_ssh(ssh_server, root) | {"ssh": f"ssh -F {config}"}), ctx)


def test_a_host_that_does_not_answer(root: Path, ctx: Context) -> None:
    for prefix in ("me@127.0.0.1:/x", "rsync://127.0.0.1:{port}/x"):
        with silent() as port:
            ssh = {"port": port} if "@" in prefix else {}
            driver = build(Rsync, {"target": prefix.format(port=port), "ssh": "ssh -F none", "timeout": 1, **ssh})
            for ask in (driver.check, driver.sources):
                with pytest.raises(TargetUnavailable):
                    ask(ctx)


def test_a_wrong_key_is_told_at_once(ssh_server: Sshd, root: Path, ctx: Context, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True)
    driver = build(Rsync, over_ssh(ssh_server, root) | {"identity_file": str(tmp_path / "other")})
    with pytest.raises(AccessDenied, match="Permission denied"):
        driver.prebackup(new_run(), ctx)
