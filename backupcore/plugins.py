"""Finding a plugin by its entry-point name. Only the named one is loaded: a broken neighbour must not break you."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from backupcore.errors import ConfigError

__all__ = ["load", "names"]

DRIVERS = "backupcore.drivers"
HYPERVISORS = "backupcore.hypervisors"


def names(group: str) -> dict[str, str]:
    """The installed plugins of a group: entry-point name -> distribution and version. None of them is loaded."""
    return {
        point.name: f"{point.dist.name} {point.dist.version}" if point.dist else ""
        for point in sorted(entry_points(group=group))
    }


def load(group: str, name: str) -> Any:
    """The object behind one entry point. ConfigError if it is not installed or cannot be imported."""
    found = [point for point in entry_points(group=group) if point.name == name]
    if not found:
        installed = ", ".join(names(group)) or "none"
        raise ConfigError(
            f"no plugin {name!r} is installed in {group}",
            f"Installed: {installed}. The first-party ones come with: pip install backupcore-{name}",
        )
    try:
        return found[0].load()
    except ImportError as error:
        raise ConfigError(f"plugin {name!r} cannot be loaded: {error}", "Reinstall its package.") from error
