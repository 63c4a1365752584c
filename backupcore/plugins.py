"""Finding a plugin by its entry-point name. Only the named one is loaded: a broken neighbour must not break you."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any

from backupcore.errors import BackupError, ConfigError, ContractViolation, text_of
from backupcore.near import near

__all__ = ["load", "loading", "names"]

DRIVERS = "backupcore.drivers"
HYPERVISORS = "backupcore.hypervisors"

_OWN = ("libvirt", "restic", "rsync", "s3")
"""Those of this project; each is in the package that has its name."""

_ANY_VERSION = re.compile(r"[\w.-]+(\[[\w.,-]*\])?")
"""A requirement that names a package and its extras, and no version."""


def names(group: str) -> dict[str, str]:
    """The installed plugins of a group: entry-point name -> distribution and version. None of them is loaded.

    Where several have one name all distributions are told.
    """
    found: dict[str, list[str]] = {}
    for point in sorted(entry_points(group=group)):
        found.setdefault(point.name, []).append(_package(point))
    return {name: ", ".join(sorted(packages)) for name, packages in found.items()}


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else ""


def _check_core(point: EntryPoint) -> None:
    """A plugin's package says which core it needs as any package does: ``dependencies = ["backupcore>=0.2"]``.

    pip sees to it, but not where a core was put back to an older version, or installed by other means. It is looked at
    before the plugin is imported, which would fail with a name that this core does not have.
    """
    wanted = [line for line in (point.dist.requires if point.dist else None) or () if line.startswith("backupcore")]
    if all(_ANY_VERSION.fullmatch(line) for line in wanted):
        return
    from packaging.requirements import Requirement  # noqa: PLC0415 - 20 ms, where a version is asked for only

    for need in map(Requirement, wanted):
        if need.name != "backupcore" or (need.marker and not need.marker.evaluate({"extra": ""})):
            continue
        here = version("backupcore")
        if not need.specifier.contains(here, prereleases=True):
            assert point.dist
            raise ConfigError(
                f"{point.dist.name} {point.dist.version} needs backupcore{need.specifier}, and {here} is installed",
                f"pip install --upgrade backupcore {point.dist.name}",
            )


def load(group: str, name: str) -> Any:
    """The object behind one entry point.

    ConfigError if it is not installed, cannot be imported, or another has its name; ContractViolation if its code fails
    then.
    """
    found = [point for point in entry_points(group=group) if point.name == name]
    if not found:
        # No other package is named: whoever has mistyped would install what a stranger has put under that name.
        hint = f"It comes with the package backupcore-{name}." if name in _OWN else near(name, names(group))
        raise ConfigError(f"no plugin {name!r} is installed in {group}", hint)
    if len({point.value for point in found}) > 1:
        # Which comes first is up to the order of folders: backups would go here today, and elsewhere tomorrow.
        packages = ", ".join(sorted(map(_package, found)))
        raise ConfigError(
            f"several plugins named {name!r} are installed in {group}: {packages}", "Uninstall all but one of them."
        )
    try:
        _check_core(found[0])
        with loading(f"plugin {name!r}", but=(ImportError, AttributeError)):
            return found[0].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"plugin {name!r} cannot be loaded: {error}", "Reinstall its package.") from error


@contextmanager
def loading(what: str, *, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """In this block code of `what` is imported or built. ContractViolation where it fails; errors of the taxonomy pass,
    and those of `but`, which the caller tells in his own words.

    Also where it ends the program: a backup would end as one that went well, and nothing would be stored.
    """
    try:
        yield
    except (BackupError, KeyboardInterrupt):
        raise
    except but:
        raise
    except BaseException as error:
        raise ContractViolation(
            f"{what} cannot be loaded: it failed with {type(error).__name__}: {text_of(error)}",
            "This is a bug of its code; -v shows where.",
        ) from error
