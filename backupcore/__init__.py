"""The core of a pluggable backup system for libvirt/KVM virtual machines.

Importing this package executes nothing: names are fetched from their modules when they are first used. The contract is
`backupcore.hookspecs`; the values that cross it are in `backupcore.model`, its errors in `backupcore.errors`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backupcore.context import Context as Context
    from backupcore.datastore import Datastore as Datastore
    from backupcore.hookspecs import hookimpl as hookimpl
    from backupcore.options import driver as driver
    from backupcore.options import option as option
    from backupcore.session import run_backup as run_backup

_WHERE = {
    "Context": "context",
    "Datastore": "datastore",
    "driver": "options",
    "hookimpl": "hookspecs",
    "option": "options",
    "run_backup": "session",
}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"backupcore.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'backupcore' has no attribute {name!r}")
