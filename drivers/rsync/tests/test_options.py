"""The options: what is refused, what reaches rsync and ssh, and what must never show."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from backupcore.context import Context
from backupcore.errors import BackupError, ConfigError
from backupcore.options import build
from backupcore_rsync import Rsync
from backupcore_rsync.target import DaemonTarget, FolderTarget, HostTarget, parse
from drivers.rsync.tests.kinds import new_artifacts, new_run


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/srv/backups/", FolderTarget(Path("/srv/backups"))),
        ("/srv/a:b", FolderTarget(Path("/srv/a:b"))),
        ("./-odd", FolderTarget(Path.cwd() / "-odd")),
        ("~/backups", FolderTarget(Path.home() / "backups")),
        ('nas:/srv/it\'s "here"', HostTarget("nas", "nas", '/srv/it\'s "here"')),
        ("me@nas.example:backups/vm:s", HostTarget("me@nas.example", "me@nas.example", "./backups/vm:s")),
        ("nas:-odd", HostTarget("nas", "nas", "./-odd")),
        ("nas:~/x/", HostTarget("nas", "nas", "./x")),
        ("nas:~/", HostTarget("nas", "nas", ".")),
        ("nas:./x", HostTarget("nas", "nas", "./x")),
        ("nas://srv//a/./b/", HostTarget("nas", "nas", "/srv/a/b")),
        ("rsync://nas/vms//a/./b//", DaemonTarget("rsync://nas/vms/./a/b", "rsync://nas/vms//a/./b")),
        ("me@[fe80::1%eth0]:/x", HostTarget("me@fe80::1%eth0", "me@[fe80::1%eth0]", "/x")),
        ("rsync://nas/vms", DaemonTarget("rsync://nas/vms/.", "rsync://nas/vms")),
        (
            "rsync://me@nas:8730/vms/-a b/",
            DaemonTarget("rsync://me@nas:8730/vms/./-a b", "rsync://me@nas:8730/vms/-a b"),
        ),
        ("rsync://[::1]/vms", DaemonTarget("rsync://[::1]/vms/.", "rsync://[::1]/vms")),
    ],
)
def test_what_a_target_means(text: str, expected: object) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "backups",
        "nas",
        "nas:",
        "-oProxyCommand=x:/srv",
        "me@-oProxyCommand=x:/srv",
        "-l@nas:/srv",
        "nas::vms",
        "file:///srv/backups",
        "ssh://nas/srv",
        "S3://bucket/x",
        "~nobody-of-that-name/x",
        "nas:/srv/*",
        "nas:/srv/a\nb",
        "rsync://nas",
        "rsync://nas/",
        "rsync://me:geheim@nas/vms",
        "rsync://-x/vms",
        "rsync://nas/v?s",
        "/..",
        "/geheim/..",
        "nas:/",
        "nas://.//",
        "nas:/srv/../geheim",
        "nas:..",
        "nas:~geheim/x",
        "nas:/srv/a\tb",
        "rsync://nas/vms/../geheim",
        "rsync://nas/vms/a\x7fb",
    ],
)
def test_what_is_no_target(text: str) -> None:
    with pytest.raises(ConfigError, match="target: ") as caught:
        build(Rsync, {"target": text})
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"ssh": ""}, "ssh: must be a command"),
        ({"ssh": "ssh -i 'x"}, "quotes closed"),
        ({"timeout": 0}, "timeout"),
        ({"port": 70000}, "port"),
        ({"limit_upload": -1}, "limit_upload"),
        ({"target": "/x", "identity_file": "/y"}, "identity_file .* for a target user@host"),
        ({"target": "rsync://nas/x", "port": 22}, "port"),
        ({"password_file": "/y"}, "password_file is for a target rsync"),
        ({"rsync_arguments": "-n"}, "rsync_arguments"),
        ({"pasword_file": "geheim"}, "pasword_file"),
    ],
)
def test_wrong_options_are_named(more: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(Rsync, {"target": "nas:/x", **more})
    assert "geheim" not in str(caught.value)


class Noted:
    """A program that writes down how it was called, and fails."""

    def __init__(self, folder: Path, name: str) -> None:
        self.program = folder / name
        self._calls = folder / f"{name}.calls"
        self._environment = folder / f"{name}.environment"
        self.program.write_text(
            f"#!/bin/sh\nfor one; do printf '%s\\n' \"$one\"; done > {shlex.quote(str(self._calls))}\n"
            f"env > {shlex.quote(str(self._environment))}\nexit 1\n"
        )
        self.program.chmod(0o755)

    @property
    def arguments(self) -> list[str]:
        return self._calls.read_text().splitlines()

    @property
    def environment(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self._environment.read_text().splitlines())


def test_what_reaches_rsync_and_ssh(tmp_path: Path, ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RSYNC_RSH", "RSYNC_PASSWORD", "OF_OURS"):
        monkeypatch.setenv(name, "of the user's shell")
    monkeypatch.delenv("HOME", raising=False)
    rsync, ssh = Noted(tmp_path, "rsync"), Noted(tmp_path, "ssh")
    options = {
        "target": "me@nas:/srv/a b",
        "ssh": f"{ssh.program} -F 'my file'",
        "binary": str(rsync.program),
        "port": 2222,
        "identity_file": "/keys/it's mine",
        "known_hosts_file": "/keys/known hosts",
        "rsync_path": "/opt/rsync",
        "limit_upload": 100,
        "rsync_arguments": ["--one", "--two"],
        "timeout": 7,
    }
    driver = build(Rsync, options)
    with pytest.raises(BackupError):
        driver.check(ctx)
    expected = [
        *("-F", "my file", "-i", "/keys/it's mine", "-p", "2222", "-o", "BatchMode=yes"),
        *("-o", "StrictHostKeyChecking=yes", "-o", "ConnectTimeout=7", "-o", "ServerAliveInterval=15"),
        *("-o", "ServerAliveCountMax=8", "-o", "LogLevel=ERROR", "-o", "RequestTTY=no", "-o", "RemoteCommand=none"),
        *("-o", 'UserKnownHostsFile="/keys/known hosts"'),
        *("-o", "GlobalKnownHostsFile=/dev/null", "-o", "IdentitiesOnly=yes"),
    ]
    assert ssh.arguments[:-2] == expected
    assert ssh.arguments[-2] == "me@nas"
    assert set(ssh.environment) <= {
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "TMPDIR",
        "SSH_AUTH_SOCK",
        "LC_ALL",
        "TZ",
        "PWD",
        "_",
        "SHLVL",
    }
    assert ssh.environment["HOME"].startswith("/")
    assert ssh.environment["LC_ALL"] == "C"

    with pytest.raises(BackupError):
        list(driver.sources(ctx))
    assert rsync.arguments[:2] == ["-s", "-e"]
    assert rsync.arguments[3] == "--rsync-path=/opt/rsync"
    assert rsync.arguments[-2:] == ["--", "me@nas:/srv/a b/"]
    assert "--one" not in rsync.arguments, "the user's own are for what copies"
    # rsync takes the words of -e apart as it does: the real one must come to the same words.
    real = build(Rsync, options | {"binary": "rsync"})
    with pytest.raises(BackupError):
        list(real.sources(ctx))
    assert ssh.arguments[: len(expected)] == expected
    assert ssh.arguments[len(expected) : len(expected) + 4] == ["-l", "me", "nas", "/opt/rsync"]

    local = build(
        Rsync, {key: options[key] for key in ("binary", "limit_upload", "rsync_arguments")} | {"target": str(tmp_path)}
    )
    with pytest.raises(BackupError):
        local.backup(new_artifacts(10), new_run(), ctx)
    assert {"--whole-file", "--recursive", "--inplace", "--bwlimit=100"} < set(rsync.arguments)
    assert rsync.arguments.index("--bwlimit=100") < rsync.arguments.index("--one")
    assert "-e" not in rsync.arguments


def test_a_password_that_anybody_can_read_is_pointed_out(
    tmp_path: Path, ctx: Context, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "key").touch(mode=0o644)
    driver = build(Rsync, {"target": "nas:/x", "identity_file": str(tmp_path / "key"), "ssh": "false"})
    with pytest.raises(BackupError):
        driver.check(ctx)
    assert "chmod 600" in caplog.text


def test_rsync_is_not_installed(tmp_path: Path, ctx: Context) -> None:
    driver = build(Rsync, {"target": str(tmp_path), "binary": "no-such-rsync", "limit_upload": 100})
    with pytest.raises(ConfigError, match="no-such-rsync") as caught:
        driver.backup(new_artifacts(10), new_run(), ctx)
    assert "apt-get install rsync" in caught.value.hint
    plain = build(Rsync, {"target": str(tmp_path), "binary": "no-such-rsync"})
    assert plain.backup(new_artifacts(10), new_run(), ctx), "a folder of this host needs none"


def test_the_readme_lists_every_option() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text().partition("## Options")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(Rsync))  # type: ignore[arg-type]
