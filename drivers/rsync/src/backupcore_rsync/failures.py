"""rsync's and ssh's exit codes and words as members of the taxonomy: the one place that knows them.

The codes alone say little: 23 is a missing file, a permission or a disk error, 12 is any end of a connection. rsync
writes the number of the system's error in parentheses, whatever language that host speaks; it is looked at first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from backupcore.errors import (
    AccessDenied,
    BackupError,
    ConfigError,
    Locked,
    TargetFull,
    TargetUnavailable,
)

__all__ = ["Refused", "translate"]


class Refused(TargetUnavailable):
    """Nobody was let in, so nothing was done: the same can be tried again."""


@dataclass(frozen=True, slots=True)
class Rule:
    """`error` for a line that `text` matches, or for an exit code of `codes`."""

    error: type[BackupError]
    text: re.Pattern[str]
    hint: str = ""
    codes: tuple[int, ...] = ()


def _text(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


_ACCOUNT = (
    "Check the account of this datastore, the target's owner and permissions, and whether it is mounted read-only."
)

_UP = "Is it up, reachable from here, and mounted over there?"

RULES = (
    Rule(
        Refused,
        _text(r"^ssh: connect to host .*: connection refused$|^(kex|ssh)_exchange_identification: "),
        _UP,
    ),
    Rule(
        Refused,
        _text(r"^@error: max connections"),
        "The daemon takes no more connections at once. Try it later, or raise max connections in its rsyncd.conf: "
        "a flatten reads and writes at the same time and needs two.",
    ),
    Rule(
        ConfigError,
        _text(r"is your shell clean\?"),
        "The account's shell prints something at its start: what its startup files (~/.bashrc and the like) print must "
        "go to terminals only.",
    ),
    Rule(
        AccessDenied,
        _text(r"remote host identification has changed"),
        "The host shows another key than it did: somebody may be in between, or it was set up anew. If you know that "
        "it was, remove its old key from the known-hosts file, known_hosts_file or ~/.ssh/known_hosts "
        "(ssh-keygen -f FILE -R HOST, with a port '[HOST]:PORT'), and append the new one (ssh-keyscan HOST) once its "
        "fingerprint is that of the host.",
    ),
    Rule(
        AccessDenied,
        _text(r"host key verification failed|no .* host key is known|no matching host key"),
        "Its key is not in the known-hosts file. Compare the fingerprint that `ssh-keyscan HOST | ssh-keygen -lf -` "
        "shows with the host's own, then append what ssh-keyscan printed to known_hosts_file (or ~/.ssh/known_hosts).",
    ),
    Rule(
        AccessDenied,
        _text(r"unprotected private key file|bad permissions"),
        "chmod 600 the identity file.",
    ),
    Rule(
        AccessDenied,
        _text(r"permission denied \((publickey|password|keyboard|gssapi|hostbased)|too many authentication failures"),
        "The host does not take this login. Check the user name, identity_file, and ~/.ssh/authorized_keys over there.",
    ),
    Rule(ConfigError, _text(r"identity file .* not accessible|load key .* (no such file|invalid format|error in)")),
    Rule(
        TargetFull,
        _text(r"\((28|122|69)\)$|no space left on device|disk quota exceeded"),
        "Make room there, or delete old backups, then run it again.",
    ),
    Rule(
        Locked,
        _text(r"configured to refuse --delete"),
        "The daemon deletes nothing (refuse options in its rsyncd.conf). If that is as you want it, retention waits.",
    ),
    Rule(
        AccessDenied,
        _text(
            r"@error: auth failed|password file must|could not open password file|module is (read|write) only"
            r"|configured to refuse"
        ),
        "Check the daemon's rsyncd.conf (auth users, read only, refuse options), and password_file (chmod 600).",
    ),
    Rule(
        ConfigError,
        _text(r"daemon refused to receive"),
        "Check the module in the daemon's rsyncd.conf: its exclude and filter must let all of a backup in.",
    ),
    Rule(
        ConfigError,
        _text(r"@error: (unknown module|chroot failed|chdir failed)"),
        "Check the module in the target, and its path in the daemon's rsyncd.conf.",
    ),
    Rule(
        ConfigError,
        _text(r"\S: (command )?not found$|failed to exec"),
        "Install it: ssh here, rsync on both hosts. Options name one that lies elsewhere: ssh, binary, rsync_path.",
        (127,),
    ),
    Rule(
        ConfigError,
        _text(r"unknown option|syntax or usage|requested action not supported|invalid (argument|value)"),
        "Check the options of this datastore.",
        (1, 4),
    ),
    Rule(
        AccessDenied,
        _text(r"\((13|1|30)\)$|: (permission denied|operation not permitted|read-only file system)$"),
        _ACCOUNT,
    ),
    Rule(
        TargetUnavailable,
        _text(
            r"connection (refused|reset|timed out|closed)|could not resolve|no route to host|network is unreachable"
            r"|name or service not known|broken pipe|timeout|timed out"
            r"|no such (file|folder)"
        ),
        _UP,
        (10, 12, 30, 35, 255),
    ),
)

_BANNER = re.compile(r"^@(@|\s)+|\s+@$")  # ssh frames its loudest warning with them
_NOISE = _text(
    r"^$|^rsync error: |^warning: permanently|^it is also possible|^someone could|^killed by signal|^debug\d: "
)


def translate(code: int, errors: str, what: str) -> BackupError:
    """The error for a program that ended with `code` and wrote `errors`; `what` says what it was to do, and where."""
    lines = [_BANNER.sub("", line.strip()) for line in errors.splitlines()]
    lines = [line for line in lines if not _NOISE.search(line)]
    found = next((rule for rule in RULES for line in lines if rule.text.search(line)), None)
    found = found or next((rule for rule in RULES if code in rule.codes), None)
    best = (
        *(line for line in lines if found and found.text.search(line)),
        *(line for line in lines if line.startswith(("rsync:", "@ERROR"))),
        *lines[-1:],
        f"ended by signal {-code}" if code < 0 else f"exit code {code}",
    )
    message = f"{what}: {best[0].removeprefix('rsync: '):.500}"
    if found is None:
        return TargetUnavailable(message)
    return found.error(message, found.hint)
