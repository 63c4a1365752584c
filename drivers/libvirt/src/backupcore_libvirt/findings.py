"""What `vmkeep check` looks at on the hypervisor's side."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from backupcore.errors import BackupError
from backupcore.hypervisor import Finding
from backupcore_libvirt.apparmor import MENDED
from backupcore_libvirt.connection import Connection
from backupcore_libvirt.folder import RunFolder, living_vms
from backupcore_libvirt.overlay.left import lost
from backupcore_libvirt.owner import confinement, default_owner
from backupcore_libvirt.place.confinement import described
from backupcore_libvirt.scratch import Owner, check_scratch, require_room, scratch_room
from backupcore_libvirt.trial import trial
from backupcore_libvirt.versions import LIBVIRT, QEMU, text

__all__ = ["findings"]


def findings(uri: str, scratch: Path, *, try_vm: bool) -> Sequence[Finding]:
    """One finding per thing that a backup needs; the first that fails does not hide the others.

    With `try_vm`, and if there is nothing wrong so far, a backup of a VM made for it is tried.
    """
    try:
        with Connection(uri) as connection:
            libvirt = connection.libvirt_version()
            owner = default_owner(connection)
            found = [
                _version("libvirt", libvirt, LIBVIRT, f" at {uri}"),
                _qemu(connection),
                _programs(),
                Finding(subject="QEMU's user", ok=True, detail=str(owner)),
                _scratch(scratch, owner),
                *_confinement(connection),
            ]
            unused = _lost(connection, scratch)
        if try_vm and all(finding.ok for finding in found):
            found.append(trial(uri, scratch, owner))
        found += unused
    except BackupError as error:
        return [Finding(subject="libvirt", ok=False, detail=error.message, hint=error.hint)]
    return found


def _version(subject: str, found: tuple[int, int, int], needed: tuple[int, int, int], where: str = "") -> Finding:
    ok = found >= needed
    return Finding(
        subject=subject, ok=ok, detail=text(found) + where, hint="" if ok else f"{text(needed)} or newer is needed."
    )


def _qemu(connection: Connection) -> Finding:
    try:
        return _version("QEMU", connection.qemu_version(), QEMU)
    except BackupError as error:
        return Finding(subject="QEMU", ok=False, detail=error.message, hint="Install QEMU.")


def _programs() -> Finding:
    """What a VM that is off is read and tracked with."""
    missing = [name for name in ("qemu-img", "qemu-nbd", "setpriv") if shutil.which(name) is None]
    return Finding(
        subject="QEMU's programs",
        ok=not missing,
        detail=f"not installed: {', '.join(missing)}" if missing else "qemu-img, qemu-nbd",
        hint="VMs that are off need them (Debian, Ubuntu: qemu-utils, util-linux)." if missing else "",
    )


def _confinement(connection: Connection) -> list[Finding]:
    models = confinement(connection)
    if not models:
        return []
    known = "" if "apparmor" in models else "; that backups work with it was read in its rules, not tried by us"
    closed = (
        f"A running VM with INCREMENT_MODE=SNAPSHOT gets fulls here, before libvirt {text(MENDED)}."
        if "apparmor" in models and connection.libvirt_version() < MENDED
        else ""
    )
    detail = f"VMs are confined by {described(models)}{known}"
    return [Finding(subject="confinement", ok=True, detail=detail, hint=closed)]


def _lost(connection: Connection, scratch: Path) -> list[Finding]:
    """What VMs have written, and do not use any more: each is a disk that lacks something."""
    found = []
    backed_up = living_vms(scratch)
    for domain in connection.domains():
        with suppress(BackupError):  # it has just gone, or `vm list` tells what hinders
            if domain.uuid not in backed_up:
                found += [(domain.name, path) for path in lost(domain, scratch)]
    return [
        Finding(
            subject=f"disks of VM {vm}",
            ok=False,
            detail=f"{path} holds what the VM has written, and the VM does not use it",
            hint="Nothing removes the file. No backup holds that, unless it was merged. "
            "The next backup says what can be done with it.",
        )
        for vm, path in found
    ]


def _scratch(scratch: Path, owner: Owner) -> Finding:
    try:
        RunFolder(scratch, "0" * 32).check_length()
        check_scratch(scratch, owner)
        require_room(scratch)
        free, kept = scratch_room(scratch)
    except BackupError as error:
        return Finding(subject="scratch folder", ok=False, detail=error.message, hint=error.hint)
    detail = f"{scratch}: {free >> 20} MiB free, of which {kept >> 20} MiB stay free"
    return Finding(subject="scratch folder", ok=True, detail=detail)
