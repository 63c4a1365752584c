"""The configuration file: where it is, what may stand in it, and every mistake in it named at once.

``--config``, else ``$VMKEEP_CONFIG``, else ``~/.config/vmkeep/config.toml`` for a user and ``/etc/vmkeep/config.toml``
for root. Values are never echoed in errors: one of them may be a secret in the wrong place.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from backupcore import options, plugins
from backupcore.errors import AccessDenied, BackupError, ConfigError, ContractViolation, NotFound, from_os_error
from backupcore.near import near
from backupcore.small_file import NotAFile, read_small

__all__ = ["Config", "Defaults", "Host", "default_path", "load"]

_DATASTORE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PLUGIN = re.compile(r"[\w.]+:[\w.]+")


def _home(system: str, user: str) -> Path:
    return Path(system) if os.geteuid() == 0 else Path.home() / user


def default_path() -> Path:
    """Where the configuration lies unless ``--config`` says otherwise."""
    named = os.environ.get("VMKEEP_CONFIG")
    return Path(named) if named else _home("/etc/vmkeep/config.toml", ".config/vmkeep/config.toml")


@dataclass(frozen=True, kw_only=True)
class Host:
    """``[host]``: where the VMs are, and where this host keeps its own things.

    `hypervisor` is the entry-point name of the hypervisor plugin; `plugins` are site plugins, each ``module:attribute``
    (an object with hookimpls, or a class of one). `scratch` defaults to a folder in `state`. `installation` is the ID
    that the state folder has whatever machine it is on; "": its own.
    """

    uri: str = dataclasses.field(default_factory=lambda: "qemu:///system" if os.geteuid() == 0 else "qemu:///session")
    state: Path = dataclasses.field(default_factory=lambda: _home("/var/lib/vmkeep", ".local/state/vmkeep"))
    scratch: Path = Path()
    hypervisor: str = "libvirt"
    plugins: tuple[str, ...] = ()
    installation: Annotated[str, Meta(pattern=r"^([0-9a-f]{32})?\Z")] = ""

    def __post_init__(self) -> None:
        if self.scratch == Path():
            object.__setattr__(self, "scratch", self.state / "scratch")


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """``[defaults]``: settings of VMs that say nothing themselves. Lists of disks are a VM's own affair."""

    mode: Literal["FULL", "INCREMENT"] | None = None
    increment_mode: Literal["CBT", "SNAPSHOT"] | None = None
    fs_freeze: Literal["NONE", "AGENT", "SUSPEND"] | None = None
    fs_freeze_fallback: bool | None = None
    freeze_timeout: Annotated[int, Meta(ge=1, le=600)] | None = None
    keep_last: Annotated[int, Meta(ge=0, le=999_999)] | None = None
    keep_chains: Annotated[int, Meta(ge=0, le=999_999)] | None = None
    full_every: Annotated[int, Meta(ge=0, le=999_999)] | Annotated[str, Meta(pattern=r"^[0-9]{1,6}d?\Z")] | None = None
    verify_flatten: Literal["SAMPLE", "ALL"] | None = None
    backup_volatile: bool | None = None
    encrypted_disks: Literal["REFUSE", "PLAIN"] | None = None
    redact: bool | None = None

    @property
    def settings(self) -> dict[str, str]:
        """The same as settings: upper-case keys, values as a VM's metadata hold them."""
        found: dict[str, str] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                said = {True: "YES", False: "NO"}[value] if isinstance(value, bool) else str(value)
                found[field.name.upper()] = said
        return found


@dataclass(frozen=True, kw_only=True)
class _File:
    host: dict[str, Any] = dataclasses.field(default_factory=dict)
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    datastores: dict[str, Any] = dataclasses.field(default_factory=dict)


class Config:
    """A configuration that has been checked: `path`, `host`, `defaults` (settings), `datastores` (name -> options)."""

    def __init__(self, path: Path, host: Host, defaults: Mapping[str, str], datastores: Mapping[str, Any]) -> None:
        self.path = path
        self.host = host
        self.defaults = defaults
        self.datastores: Mapping[str, Mapping[str, object]] = datastores

    def datastore(self, name: str | None) -> str:
        """The name of the datastore to use: `name` if it is configured, else the only one there is."""
        if name is not None:
            if name in self.datastores:
                return name
            raise NotFound(f"no datastore {name!r} in {self.path}", near(name, self.datastores))
        if len(self.datastores) == 1:
            return next(iter(self.datastores))
        if not self.datastores:
            raise ConfigError(f"no datastore is configured in {self.path}", "Add a [datastores.NAME] table there.")
        raise ConfigError(
            f"several datastores are configured: {', '.join(sorted(self.datastores))}", "Name one with -d DATASTORE."
        )


def load(path: Path | None = None) -> Config:
    """The checked configuration. ConfigError names every wrong key with the file; AccessDenied if it is unreadable."""
    where = path or default_path()
    try:
        data = tomllib.loads(read_small(where).decode())
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration at {where}", "Write one with: vmkeep init") from None
    except NotAFile as error:
        raise ConfigError(
            f"the configuration {where} cannot be read: {error.strerror}", "Name a file with --config."
        ) from None
    except PermissionError as error:
        raise AccessDenied(f"the configuration {where} cannot be read", "Run as its owner, or use --config.") from error
    except OSError as error:
        raise from_os_error(error, f"the configuration {where}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: not UTF-8 text", "Save the file as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: not valid TOML: {error}", "Mend the file at the place named.") from None
    tables, wrong = options.checked(_File, data)
    host = _host(tables.get("host", {}), wrong)
    defaults, mistakes = options.checked(Defaults, tables.get("defaults", {}), where="defaults")
    wrong += mistakes
    hints = list(_meant(data, tables))
    datastores = tables.get("datastores", {})
    for name, table in datastores.items():
        if not _DATASTORE.fullmatch(name):
            wrong.append(f"datastores.{name}: a name has letters, digits, '.', '_' and '-' only, 64 at most")
        elif not isinstance(table, dict):
            wrong.append(f"datastores.{name}: expected table")
        else:
            _check_options(name, table, wrong, hints)
    if wrong:
        hint = " ".join(dict.fromkeys(hints)) or "Mend the keys named. A commented example: vmkeep init --config FILE"
        raise ConfigError(f"{where}: {'; '.join(wrong)}", hint)
    return Config(where, Host(**host), Defaults(**defaults).settings, datastores)


def _host(table: Mapping[str, Any], wrong: list[str]) -> dict[str, Any]:
    values, mistakes = options.checked(Host, table, where="host")
    wrong += mistakes
    for name in [key for key in values if key in ("state", "scratch")]:
        values[name] = values[name].expanduser()
        if not values[name].is_absolute():
            wrong.append(f"host.{name}: must be an absolute path")
    if not all(_PLUGIN.fullmatch(name) for name in values.get("plugins", ())):
        wrong.append("host.plugins: each must be written module:attribute")
    return values


def _meant(data: Mapping[str, Any], tables: Mapping[str, Any]) -> Iterator[str]:
    places = (
        ("", data, _File),
        ("host.", tables.get("host", {}), Host),
        ("defaults.", tables.get("defaults", {}), Defaults),
    )
    for before, table, kind in places:
        known = [field.name for field in dataclasses.fields(kind)]
        for key in [key for key in table if key not in known]:
            yield from (f"Did you mean {before}{close}?" for close in difflib.get_close_matches(key, known, 1, 0.6))


def _check_options(name: str, table: Mapping[str, Any], wrong: list[str], hints: list[str]) -> None:
    where = f"datastores.{name}"
    rest = {key: value for key, value in table.items() if key != "driver"}
    driver = table.get("driver")
    if not isinstance(driver, str):
        wrong.append(f"{where}.driver: required, the name of a driver (vmkeep driver list)")
        return
    try:
        options.build(plugins.load(plugins.DRIVERS, driver), rest, where=where)
    except ContractViolation as error:
        wrong.append(f"{where}.driver: {error.message}")
    except ConfigError as error:
        wrong.append(error.message if error.message.startswith(where) else f"{where}.driver: {error.message}")
        hints.append(_option_hint(driver, rest, error))


def _option_hint(driver: str, table: Mapping[str, Any], error: BackupError) -> str:
    try:
        known = list(getattr(plugins.load(plugins.DRIVERS, driver), "__dataclass_fields__", {}))
    except ConfigError:
        return error.hint
    for key in table:
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        if key not in known and close:
            return f"Did you mean {close[0]}?"
    return error.hint
