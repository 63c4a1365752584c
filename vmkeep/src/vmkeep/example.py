"""The configuration that ``vmkeep init`` writes."""

from __future__ import annotations

import json
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from backupcore.errors import ConfigError, from_os_error

__all__ = ["Written", "write"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_HEAD = """\
# Configuration of vmkeep. What is commented out shows the default.

[host]
# uri = "{uri}"
# state = "{state}"           # catalog, locks, folders of runs
# scratch = "{state}/scratch" # blocks that guests overwrite during a backup; QEMU's user writes here
# installation = "ID"             # go on as this one, though the state folder comes from another machine
# plugins = ["package.module:attribute"]      # site plugins: objects or classes with hooks

[defaults]                        # for VMs that say nothing themselves (vmkeep vm updateconf)
# mode = "INCREMENT"              # or "FULL": every backup a full
# fs_freeze = "NONE"              # "AGENT": the guest's file systems at rest for a moment; "SUSPEND": its processors
# fs_freeze_fallback = false      # true: a backup whose freeze fails goes on without it
# freeze_timeout = 10             # seconds that the guest may stand still
# backup_volatile = false         # true: also transient disks and those that a VM calls volatile
# encrypted_disks = "REFUSE"      # "PLAIN": backups of encrypted disks hold their contents unencrypted
# redact = false                  # true: stored definitions lack arguments of QEMU, descriptions and the like
# keep_last = 0                   # how many backups to keep, 7 say; 0: all
# full_every = 0                  # a new image every so many increments, or days ("30d"); 0: never
# verify_flatten = "SAMPLE"       # or "ALL": read everything back where a store has merged on its own side
"""

_EMPTY = """
# At least one datastore. Remove the leading "# " of these lines and fill them in. The password file holds one line, the
# key to the backups: keep a copy of it somewhere else. `vmkeep init --repository PLACE` would have done all this.
# [datastores.{name}]
# driver = "restic"
# repository = "/srv/backups"     # or whatever restic takes: sftp:user@host:/path, rest:https://…, s3:…
# password_file = "{password}"
"""

_FILLED = """
[datastores.{name}]
driver = "restic"
repository = {repository}
password_file = {password}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The files that were made; `password` is None where no datastore was asked for."""

    config: Path
    password: Path | None


def write(path: Path, *, datastore: str, repository: str | None) -> Written:
    """Write a commented configuration to `path`; with `repository` a complete one, and a password file beside it.

    ConfigError if one of the files exists already.
    """
    if not _NAME.fullmatch(datastore):
        raise ConfigError("--datastore: letters, digits, dots, dashes and underscores only", "Choose another name.")
    path = path.expanduser().absolute()
    password = path.parent / f"{datastore}.password"
    system = os.geteuid() == 0
    text = _HEAD.format(
        uri="qemu:///system" if system else "qemu:///session",
        state="/var/lib/vmkeep" if system else "~/.local/state/vmkeep",
    )
    for existing in (path, password) if repository else (path,):
        if os.path.lexists(existing):
            raise ConfigError(f"{existing} exists already", "It is left as it is. Edit it, or use --config.")
    if repository is None:
        _create(path, text + _EMPTY.format(name=datastore, password=password))
        return Written(config=path, password=None)
    if not repository.isprintable() or not repository:
        raise ConfigError("--repository is no place that restic could use", "Give a folder, or sftp:…, rest:…, s3:…")
    where = repository if ":" in repository else str(Path(repository).expanduser().absolute())
    _create(password, secrets.token_urlsafe(32) + "\n")
    try:
        # A JSON string of printable characters is a TOML string too.
        quoted = {"repository": json.dumps(where), "password": json.dumps(str(password))}
        _create(path, text + _FILLED.format(name=datastore, **quoted))
    except BaseException:
        password.unlink()
        raise
    return Written(config=path, password=password)


def _create(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} exists already", "It is left as it is. Edit it, or use --config.") from None
    except OSError as error:
        raise from_os_error(error, f"writing {path}") from error
