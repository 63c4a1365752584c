"""What AppArmor, as libvirt sets it up, denies to a VM's QEMU that a backup by overlays needs."""

from __future__ import annotations

from backupcore_libvirt.connection import Connection, Domain
from backupcore_libvirt.xml import Element, parse

__all__ = ["MENDED", "denies_merges", "is_confined"]

MENDED = (12, 1, 0)
"""The first libvirt whose profiles let a running VM write to a file below its disk's own when that is asked for."""


def denies_merges(connection: Connection, domain: Domain) -> bool:
    """Whether this VM runs under a profile in which a file below its disk's own stays closed, once it has been one.

    libvirt before 12.1 writes ``deny "<file>" w`` into the profile for each such file when the VM starts and when a
    commit has ended, and what it adds to allow a commit is of no effect beside that (seen with 9.0 and 11.3). The file
    that the VM started on, and has written to until a snapshot, is not closed: an active commit into that works.
    """
    if not domain.is_active() or connection.libvirt_version() >= MENDED:
        return False
    return is_confined(parse(domain.live_xml()))


def is_confined(definition: Element) -> bool:
    """Whether the VM of this running definition has an AppArmor profile."""
    labels = definition.findall("./seclabel")
    return any(label.get("model") == "apparmor" and label.get("type") != "none" for label in labels)
