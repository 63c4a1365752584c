"""Is everything here that backups need? Every part is looked at, also after one that failed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from backupcore.errors import AccessDenied, BackupError, ConfigError, HypervisorError
from backupcore.hypervisor import Finding
from vmkeep import config
from vmkeep.workplace import Workplace

__all__ = ["Answer", "check"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One finding; `error` is what a backup would fail with, None where all is well."""

    finding: Finding
    error: BackupError | None = None


def check(path: Path | None, *, try_vm: bool = True) -> Iterator[Answer]:
    """Look at the configuration, the state folder, the hypervisor and every datastore; each answer as it is found.

    With `try_vm` the hypervisor tries a backup on a VM that it makes for it.
    """
    try:
        found = config.load(path)
    except BackupError as error:
        yield _failed("configuration", error)
        return
    yield _ok("configuration", str(found.path))
    place = Workplace(found)
    yield _tried("state", lambda: _state(place))
    yield _tried("installation", lambda: _installation(place))
    yield from _hypervisor(place, try_vm=try_vm)
    if not found.datastores:
        yield _failed(
            "datastores", ConfigError("none is configured", f"Add a [datastores.NAME] table to {found.path}.")
        )
    for name in found.datastores:
        yield _tried(f"datastore {name}", lambda name=name: _datastore(place, name))  # type: ignore[misc]  # mypy cannot infer a lambda with a default


def _ok(subject: str, detail: str) -> Answer:
    return Answer(finding=Finding(subject=subject, ok=True, detail=detail))


def _failed(subject: str, error: BackupError) -> Answer:
    return Answer(finding=Finding(subject=subject, ok=False, detail=error.message, hint=error.hint), error=error)


def _tried(subject: str, look: Callable[[], str]) -> Answer:
    try:
        return _ok(subject, look())
    except BackupError as error:
        return _failed(subject, error)


def _state(place: Workplace) -> str:
    if not place.state.exists():
        above = next(folder for folder in place.state.absolute().parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise AccessDenied(
                f"the state folder {place.state} is not there, and cannot be made in {above}",
                "Run as the owner of that, make it, or set [host] state.",
            )
        return f"{place.state} (the first backup makes it)"
    if not os.access(place.state, os.W_OK | os.X_OK):
        raise AccessDenied(
            f"the state folder {place.state} cannot be written to", "Run as its owner, or set [host] state."
        )
    place.catalog  # noqa: B018 - opening it is the check
    return str(place.state)


def _installation(place: Workplace) -> str:
    own = place.installation_if_any
    return f"{own.id or 'gets its ID with the first backup'} (host {own.host})"


def _hypervisor(place: Workplace, *, try_vm: bool) -> Iterator[Answer]:
    try:
        place.site_plugins  # noqa: B018 - loading them is the check
        found = place.hypervisor.check(try_vm=try_vm)
    except BackupError as error:
        yield _failed("hypervisor", error)
        return
    for finding in found:
        wrong = None if finding.ok else HypervisorError(f"{finding.subject}: {finding.detail}", finding.hint)
        yield Answer(finding=finding, error=wrong)


def _datastore(place: Workplace, name: str) -> str:
    store = place.datastore(name, hypervisor=False)
    with place.context() as ctx:
        store.check(ctx)
    return f"{store.kind}: reachable"
