"""Every text and exit code that the driver tells apart, from restic 0.14 and from the newest."""

from __future__ import annotations

import json

import pytest

from backupcore.errors import (
    AccessDenied,
    BackupError,
    Busy,
    ConfigError,
    IntegrityError,
    SourceNotFound,
    TargetFull,
    TargetUnavailable,
    UnsupportedOperation,
)
from backupcore_restic.failures import NoRepository, last_words, redact, translate

QUESTION = "Is there a repository at the following location?\n/srv/backups\n"
NO_WRITE = "open /srv/backups/locks/6f4b: read-only file system\ngithub.com/restic/restic/internal/backend.Save\n\t"
LOCKED = "repository is already locked exclusively by PID 11 on nas by root (UID 0, GID 0)\n"


@pytest.mark.parametrize(
    ("code", "errors", "kind", "reason"),
    [
        # 0.14 and later: the text alone
        (1, "Fatal: wrong password or no key found\n", AccessDenied, "wrong password or no key found"),
        (
            1,
            f"unable to create lock in backend: {LOCKED}lock was created at 2026-01-02 (1s ago)\nstorage ID 5d09\n"
            "the `unlock` command can be used to remove stale locks\n",
            Busy,
            "locked exclusively by PID 11 on nas",
        ),
        (
            1,
            f"Fatal: unable to open config file: stat /srv/backups/config: no such file or directory\n{QUESTION}",
            NoRepository,
            "stat /srv/backups/config",
        ),
        (1, f"Fatal: unable to open config file: <config/> does not exist\n{QUESTION}", NoRepository, "<config/>"),
        (
            1,
            f"Fatal: unable to open config file: Stat: The specified key does not exist.\n{QUESTION}",
            NoRepository,
            "key does not exist",
        ),
        # ... which must not be mistaken for "no repository"
        (
            1,
            f"Fatal: unable to open config file: Stat: The specified bucket does not exist\n{QUESTION}",
            TargetUnavailable,
            "bucket does not exist",
        ),
        (
            1,
            'Fatal: unable to open config file: client.Head: Head "http://a/config": dial tcp 127.0.0.1:1: connect: '
            f"connection refused\n{QUESTION}",
            TargetUnavailable,
            "connection refused",
        ),
        (
            1,
            f"Fatal: unable to open config file: stat /srv/backups/config: permission denied\n{QUESTION}",
            AccessDenied,
            "permission denied",
        ),
        (
            1,
            f"Fatal: unable to open config file: stat /srv/backups/config: stale NFS file handle\n{QUESTION}",
            TargetUnavailable,
            "stale NFS file handle",
        ),
        (
            1,
            'Fatal: unable to open config file: Get "https://s3/": dial tcp: lookup s3: no such host\n' + QUESTION,
            TargetUnavailable,
            "no such host",
        ),
        (
            1,
            "Fatal: unable to save snapshot: write /srv/backups/data/58/58-tmp-1: no space left on device\n",
            TargetFull,
            "no space left on device",
        ),
        (1, "Fatal: unable to save snapshot: write /nas/x: disk quota exceeded\n", TargetFull, "quota"),
        (
            1,
            f"{NO_WRITE}/build/backend/local/local.go:403\nruntime.goexit\n\truntime/asm_amd64.s:1594\n"
            "unable to create lock in backend\n",
            AccessDenied,
            "read-only file system",
        ),
        (1, "\t/build/backend/local/local.go:403\nconnection reset by peer\n", TargetUnavailable, "reset by peer"),
        (1, "Fatal: unexpected HTTP response (403): 403 Forbidden\n", AccessDenied, "403"),
        (1, "Resolving password failed: Fatal: /nowhere does not exist\n", ConfigError, "/nowhere does not exist"),
        (1, "Fatal: an empty password is not a password\n", ConfigError, "empty password"),
        (1, "Fatal: parsing repository location failed: invalid backend\nIf the …\n", ConfigError, "invalid backend"),
        (1, "Fatal: compression requires at least repository format version 2\n", UnsupportedOperation, "version 2"),
        (
            1,
            "subprocess ssh: ssh: connect to host nas port 22: Connection refused\n"
            "Fatal: unable to open repository at sftp:nas:/x: unable to start the sftp session, error: EOF\n",
            TargetUnavailable,
            "nas port 22: Connection refused",
        ),
        (1, "subprocess ssh: u@nas: Permission denied (publickey).\nFatal: … EOF\n", AccessDenied, "publickey"),
        (1, 'invalid id "0": no matching ID found for prefix "0"\n', SourceNotFound, "no matching ID"),
        # 0.18, of a snapshot that is gone: a folder, REST, S3
        (
            1,
            json.dumps(
                {
                    "message_type": "exit_error",
                    "code": 1,
                    "message": "failed to load snapshot 09115484: open /r/09115484: no such file or directory",
                }
            ),
            SourceNotFound,
            "failed to load snapshot 09115484",
        ),
        (
            1,
            "Fatal: failed to find snapshot: failed to load snapshot 3eb1: <snapshot/3eb1> does not exist\n",
            SourceNotFound,
            "3eb1",
        ),
        (1, "Fatal: failed to load snapshot 3eb1: The specified key does not exist.\n", SourceNotFound, "3eb1"),
        (1, "Fatal: failed to load snapshot 3eb1: connection refused\n", TargetUnavailable, "refused"),
        (1, "Fatal: ciphertext verification failed\n", IntegrityError, "ciphertext"),
        # A pack that is gone: a folder (0.14), REST, S3; what is tried again and ends otherwise; a prune
        (
            1,
            "Load(<data/ee71c4c032>, 777, 129) returned error, retrying after 5s: open /x: no such file or directory\n"
            "cannot dump file: ReadFull(<data/ee71c4c032>): open /r/x: no such file or directory\n",
            IntegrityError,
            "ReadFull",
        ),
        (1, "cannot dump file: Load(<data/ee71c4>, 7, 1): <data/ee71c4> does not exist\n", IntegrityError, "exist"),
        (1, "cannot dump file: ReadFull(<data/ee71>): The specified key does not exist.\n", IntegrityError, "key"),
        (
            1,
            "Load(<data/ee71c4c032>, 777, 129) returned error, retrying after 5s: open /x: no such file or directory\n"
            "cannot dump file: ReadFull(<data/ee71c4c032>): stale NFS file handle\n",
            TargetUnavailable,
            "stale",
        ),
        (1, "Fatal: packs from index missing in repo\n", IntegrityError, "missing in repo"),
        (-9, "", TargetUnavailable, "signal 9"),
        (1, "", TargetUnavailable, "exit code 1"),
        # 0.17 and later: exit codes, and JSON on stderr where JSON was asked for
        (10, f"Fatal: repository does not exist: unable to open config file: x\n{QUESTION}", NoRepository, "not exist"),
        (11, f"unable to create lock in backend: {LOCKED}", Busy, "locked exclusively"),
        (12, "Fatal: wrong password or no key found\n", AccessDenied, "wrong password"),
        (
            12,
            json.dumps({"message_type": "exit_error", "code": 12, "message": "Fatal: wrong password or no key found"}),
            AccessDenied,
            "wrong password",
        ),
        (
            10,
            json.dumps({"message_type": "exit_error", "code": 10, "message": f"Fatal: repository …\n{QUESTION}"}),
            NoRepository,
            "repository",
        ),
        (
            3,
            json.dumps({"message_type": "error", "error": {"message": "read x: input/output error"}, "item": "/x"}),
            TargetUnavailable,
            "input/output error",
        ),
        # Whoever has codes is believed by them, and not by words that happen to occur.
        (3, "Fatal: repository is already locked by PID 11\n", TargetUnavailable, "already locked"),
        (
            130,
            "Fatal: unable to open config file: stat /r/config: no such file or directory\n",
            TargetUnavailable,
            "stat",
        ),
        (99, "Fatal: something that no version says yet\n", TargetUnavailable, "no version says"),
    ],
)
def test_translate(code: int, errors: str, kind: type[BackupError], reason: str) -> None:
    error = translate(code, errors, "opening the repository")
    assert type(error) is kind, error
    assert reason in error.message
    assert "\n" not in error.message
    assert not error.message.endswith("/srv/backups")


def test_the_cause_of_many_tries_is_told() -> None:
    errors = (
        'Stat(<config/>) returned error, retrying after 2.9s: Head "http://me:***@h:1/config": connection refused\n'
        'Stat(<config/>) returned error, retrying after 5.0s: Head "http://h/config": no route to KEYKEYKEY\n'
        "signal interrupt received, cleaning up\nFatal: unable to open config file: context canceled\n"
    )
    assert last_words(errors, ["KEYKEYKEY"]).endswith('5.0s: Head "http://h/config": no route to ***')
    assert last_words("Fatal: unable to open config file: context canceled\n") == "it says nothing"
    assert last_words("subprocess ssh: kex failed\n") == "subprocess ssh: kex failed"


def test_no_secret_is_shown() -> None:
    errors = "Fatal: rest:https://me:p@ss:word@nas/x and KEYKEYKEY failed\n"
    error = translate(1, errors, "asking", ["KEYKEYKEY"])
    assert error.message == "asking: rest:https://***@nas/x and *** failed"
    assert redact("sftp:user@nas:/path") == "sftp:user@nas:/path"
