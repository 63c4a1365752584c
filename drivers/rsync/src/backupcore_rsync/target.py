"""Where the backups go: a folder of this host, ``[user@]host:path`` over ssh, or ``rsync://host/module/path``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from backupcore.errors import ConfigError

__all__ = ["DaemonTarget", "FolderTarget", "HostTarget", "Target", "parse"]

# Neither may begin with a dash: ssh and rsync would take it for an option.
_USER = r"[A-Za-z0-9_][A-Za-z0-9_.\\-]*"
_HOST = r"[A-Za-z0-9_][A-Za-z0-9_.-]*|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?\]"
_SSH = re.compile(rf"(?:(?P<user>{_USER})@)?(?P<host>{_HOST}):(?P<path>.+)", re.DOTALL)
_OTHERS = re.compile(r"(file|ssh|sftp|https?|ftps?|s3|smb|cifs|nfs|rclone|rest)://", re.IGNORECASE)
"""What others write so; as user@host:path it would be a host of that name."""
_DAEMON = re.compile(
    rf"rsync://(?P<at>(?:{_USER}@)?(?:{_HOST})(?::[0-9]{{1,5}})?)/(?P<module>[^/]+)(?P<path>/.*)?", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class FolderTarget:
    """A folder of this host."""

    path: Path


@dataclass(frozen=True, slots=True)
class HostTarget:
    """A folder of another host, over ssh.

    `login` is what ssh is given, `at` what rsync is given (they differ for IPv6). A path that is not absolute is below
    the account's home.
    """

    login: str
    at: str
    path: str


@dataclass(frozen=True, slots=True)
class DaemonTarget:
    """A folder in a module of an rsync daemon. `url` is what rsync is given, `name` what the user wrote."""

    url: str
    name: str


Target = FolderTarget | HostTarget | DaemonTarget


def parse(text: str) -> Target:
    """The target that `text` names. ConfigError says what is wrong with it, and does not show it."""
    if not text or "\0" in text or "\n" in text:
        raise ConfigError("target: must be an absolute path, user@host:path or rsync://host/module")
    if text.startswith("rsync:"):
        return _daemon(text)
    if text.startswith(("/", "./", "../", "~")):
        try:
            folder = Path(text).expanduser().absolute()
        except RuntimeError:
            raise ConfigError("target: there is no account of that name on this host: write the path in full") from None
        if os.path.normpath(folder).strip("/") == "":
            raise ConfigError("target: must not be the root of the file system")
        return FolderTarget(folder)
    return _host(text)


def _daemon(text: str) -> DaemonTarget:
    found = _DAEMON.fullmatch(text)
    if not found:
        raise ConfigError(
            "target: must be rsync://[user@]host[:port]/module[/path]; a password goes into password_file"
        )
    _no_wildcards(text[found.end("at") :])
    path = _tidy(found["path"] or "")
    # The dot: a daemon takes what follows the module for an option if it begins with a dash.
    return DaemonTarget(f"rsync://{found['at']}/{found['module']}/.{path}", text.rstrip("/"))


def _host(text: str) -> HostTarget:
    if _OTHERS.match(text):
        raise ConfigError(
            "target: rsync knows no such address: must be an absolute path, user@host:path or rsync://host/module"
        )
    found = _SSH.fullmatch(text)
    if not found:
        raise ConfigError(
            "target: must be an absolute path, user@host:path or rsync://host/module; a relative path begins with ./"
        )
    path = found["path"].removeprefix("~/")
    if path.startswith(":"):
        raise ConfigError("target: write a daemon's module as rsync://host/module")
    if path.startswith("~"):
        raise ConfigError("target: the home of another account is not looked up: write the path in full")
    _no_wildcards(path)
    folder = _tidy(path)
    if path.startswith("/") and not folder:
        raise ConfigError("target: must not be the root of the file system")
    user = f"{found['user']}@" if found["user"] else ""
    return HostTarget(
        user + found["host"].strip("[]"), user + found["host"], folder if path.startswith("/") else f".{folder}"
    )


def _tidy(path: str) -> str:
    """The path with a slash before each of its folders, and none that is empty or a dot; "" if there is no folder.

    rsync's filters, which name what is deleted, would know another form of it than its listings show.
    """
    parts = [part for part in path.split("/") if part not in {"", "."}]
    if ".." in parts:
        raise ConfigError("target: must not hold .. as a folder: write where it leads to")
    if not path.isprintable():
        raise ConfigError("target: must not hold control characters")
    return "".join(f"/{part}" for part in parts)


def _no_wildcards(path: str) -> None:
    if set(path) & set("*?["):
        raise ConfigError("target: rsync would take * ? [ in a path at another host for wildcards")
