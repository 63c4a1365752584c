"""Every text and exit code that the driver tells apart; most were read off rsync 3.2 and OpenSSH 9.2."""

from __future__ import annotations

import pytest

from backupcore.errors import AccessDenied, BackupError, ConfigError, TargetFull, TargetUnavailable
from backupcore_rsync.failures import Refused, translate

CLOSED = (
    "rsync: connection unexpectedly closed (0 bytes received so far) [sender]\nrsync error: x (code 12) at io.c(231)\n"
)
CHANGED = (
    "@@@@@@@@@@@@@@@@@@@@\n@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\n@@@@@@@@@@@@@@@@@@@@\n"
    "IT IS POSSIBLE THAT SOMEONE IS DOING SOMETHING NASTY!\nSomeone could be eavesdropping on you right now!\n"
    "It is also possible that a host key has just been changed.\nHost key verification failed.\n"
)


@pytest.mark.parametrize(
    ("code", "errors", "kind", "reason"),
    [
        (
            11,
            'rsync: [receiver] write failed on "/x/d": No space left on device (28)\nrsync error: …',
            TargetFull,
            "No space",
        ),
        (11, 'rsync: [receiver] write failed on "/x/d": Kein Platz mehr (28)\n', TargetFull, "Kein Platz"),
        (11, 'rsync: [receiver] write failed on "/x/d": Disk quota exceeded (122)\n', TargetFull, "quota"),
        (1, "sync: error syncing 'x': No space left on device\n", TargetFull, "No space"),
        (23, 'rsync: [generator] recv_generator: mkdir "/x" failed: Keine Berechtigung (13)\n', AccessDenied, "(13)"),
        (23, 'rsync: [receiver] mkstemp "/x" failed: Read-only file system (30)\n', AccessDenied, "Read-only"),
        (
            23,
            'rsync: [sender] change_dir "/x" failed: No such file or directory (2)\n',
            TargetUnavailable,
            "change_dir",
        ),
        (23, 'rsync: [sender] read errors mapping "/x": Input/output error (5)\n', TargetUnavailable, "Input/output"),
        (24, "file has vanished: x\n", TargetUnavailable, "vanished"),
        (255, CHANGED, AccessDenied, "REMOTE HOST IDENTIFICATION"),
        (12, f"{CHANGED}{CLOSED}", AccessDenied, "REMOTE HOST IDENTIFICATION"),
        (255, "Host key verification failed.\n", AccessDenied, "Host key"),
        (255, "me@nas: Permission denied (publickey,password).\n", AccessDenied, "publickey"),
        (255, "ssh: connect to host nas port 22: Connection refused\n", Refused, "refused"),
        (255, "ssh: Could not resolve hostname nas: Name or service not known\n", TargetUnavailable, "resolve"),
        (255, "Connection to nas closed by remote host.\n", TargetUnavailable, "closed"),
        (12, f"bash: line 1: rsync: command not found\n{CLOSED}", ConfigError, "rsync: command not found"),
        (127, "sh: 1: rsync: not found\n", ConfigError, "not found"),
        (14, "rsync: Failed to exec ssh: No such file or directory (2)\n", ConfigError, "exec ssh"),
        (
            1,
            "rsync: --no-such: unknown option\nrsync error: syntax or usage error (code 1)\n",
            ConfigError,
            "unknown option",
        ),
        (5, "@ERROR: auth failed on module vms\nrsync error: …", AccessDenied, "auth failed"),
        (5, "@ERROR: Unknown module 'x'\n", ConfigError, "Unknown module"),
        (5, "@ERROR: max connections (1) reached -- try again later\n", Refused, "max connections"),
        (
            2,
            "protocol version mismatch -- is your shell clean?\n(see the rsync manpage for an explanation)\n",
            ConfigError,
            "clean",
        ),
        (1, "This host is not permitted to strangers\nmkdir: x: Permission denied\n", AccessDenied, "mkdir"),
        (255, "Access is not permitted here\nConnection closed by 10.0.0.1 port 22\n", TargetUnavailable, "closed"),
        (
            10,
            "rsync: [Receiver] failed to connect to nas (10.0.0.1): Connection refused (111)\n",
            TargetUnavailable,
            "(111)",
        ),
        (30, "rsync error: timeout in data send/receive (code 30) at io.c(1)\n", TargetUnavailable, "exit code 30"),
        (12, CLOSED, TargetUnavailable, "unexpectedly closed"),
        (-9, "", TargetUnavailable, "signal 9"),
        (99, "something that no version says yet\n", TargetUnavailable, "no version says"),
    ],
)
def test_translate(code: int, errors: str, kind: type[BackupError], reason: str) -> None:
    error = translate(code, errors, "backing up to nas:/x")
    assert type(error) is kind, error
    assert reason in error.message
    assert error.message.startswith("backing up to nas:/x: ")
    assert "\n" not in error.message


@pytest.mark.parametrize(
    ("code", "errors", "told"),
    [
        (255, CHANGED, ("ssh-keygen -f FILE -R HOST", "known_hosts_file", "ssh-keyscan HOST")),
        (5, "@ERROR: max connections (1) reached -- try again later\n", ("max connections", "flatten")),
        (255, "", ("reachable",)),
        (12, CLOSED, ("reachable",)),
        (1, "/srv/backups: permission denied\n", ("permissions", "read-only")),
        (23, 'ERROR: daemon refused to receive file "manifest.json"\n', ("rsyncd.conf", "exclude", "filter")),
    ],
)
def test_a_hint_stands_for_itself(code: int, errors: str, told: tuple[str, ...]) -> None:
    hint = translate(code, errors, "backing up to nas:/x").hint
    assert all(one in hint for one in told), hint
    assert "below" not in hint, "nothing follows it"
