"""Defining a restored VM."""

from __future__ import annotations

import os
from pathlib import Path

from backupcore.errors import AccessDenied, BackupError, ConfigError, HypervisorError, UnsupportedOperation
from backupcore.model import VM
from backupcore.typed import typed
from backupcore_libvirt.connection import Connection
from backupcore_libvirt.owner import default_owner
from backupcore_libvirt.xml import parse

__all__ = ["define", "require_definable"]


def require_definable(connection: Connection, name: str, uuid: str | None, folder: Path) -> None:
    """That no VM has this name or UUID, and that QEMU's user can pass to `folder`, as much of it as exists."""
    for domain in connection.domains():
        if domain.name == name:
            raise ConfigError(f"there is a VM {name} already ({domain.uuid})", "Choose another --name.")
        if domain.uuid == uuid:
            raise ConfigError(
                f"the UUID {uuid} is that of VM {domain.name}, which is still there",
                "Leave out --keep-uuid, or restore its disks with --in-place.",
            )
    owner = default_owner(connection)
    if owner.uid != os.geteuid() and os.geteuid() != 0:
        return  # libvirt will say so: only root can look for another user
    for part in reversed([folder, *folder.parents]):
        # libvirt hands the files themselves over to QEMU's user when the VM starts, but no folder.
        if part.is_dir() and not owner.may("x", part):
            raise AccessDenied(
                f"QEMU runs as {owner} and cannot pass {part}, so a VM could not use disks in {folder}",
                f"Let it pass: {typed('chmod o+x', part)}; or choose another folder with --to.",
            )


def define(connection: Connection, definition: bytes) -> VM:
    """Define the VM; an existing one is never changed."""
    root = parse(definition)
    name, uuid = root.findtext("name", ""), root.findtext("uuid")
    if any(name == domain.name or uuid == domain.uuid for domain in connection.domains()):
        raise HypervisorError(f"a VM {name}, or one of its UUID, was defined meanwhile")
    try:
        domain = connection.define(definition.decode())
    except UnsupportedOperation as error:
        raise UnsupportedOperation(error.message, "The definition asks for what this host has not got.") from error
    except BackupError as error:
        raise HypervisorError(error.message, "Edit the definition, then: virsh define FILE") from error
    return VM(uuid=domain.uuid, name=domain.name)
