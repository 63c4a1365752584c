"""Which libvirt and QEMU are needed, and which are there."""

from __future__ import annotations

from backupcore.errors import UnsupportedOperation
from backupcore_libvirt.connection import Connection, Domain
from backupcore_libvirt.xml import parse

__all__ = ["qemu_of", "require", "require_stopped", "survives_clients_of_iothreads", "text"]

LIBVIRT = (7, 2, 0)
QEMU = (5, 2, 0)


def text(version: tuple[int, int, int]) -> str:
    """``9.0.0``."""
    return ".".join(str(part) for part in version)


def qemu_of(domain: Domain) -> tuple[int, int, int]:
    """The version of the QEMU that a running VM runs in, which may be older than the one installed."""
    qemu = domain.query("query-version")["qemu"]
    return int(qemu["major"]), int(qemu["minor"]), int(qemu["micro"])


def survives_clients_of_iothreads(qemu: tuple[int, int, int]) -> bool:
    """Whether this QEMU outlives an NBD client that leaves the export of a disk which an I/O thread serves.

    Before commit f816310d0c32 ("nbd/server: only traverse NBDExport->clients from main loop thread", in 9.0.0 and
    8.2.3) the end of such a client was dealt with in the I/O thread. Since the fix of CVE-2024-7409, which went into
    7.2.14 and distributions' older ones, QEMU asserts that it is in its main loop then, and dies of it (``blockdev-
    nbd.c: nbd_blockdev_client_closed: Assertion``; seen with 7.2.22, every time); without that fix it is a race. What a
    distribution has put into an older version is not known: it counts as one that dies.
    """
    return qemu >= (9, 0, 0) or (8, 2, 3) <= qemu < (8, 3, 0)


def require_stopped(connection: Connection, domain: Domain) -> dict[str, str]:
    """The versions that take part in the backup of a VM that is off: of QEMU, the one that is installed."""
    libvirt, qemu = connection.libvirt_version(), connection.qemu_version()
    if qemu < QEMU:
        raise UnsupportedOperation(
            f"VM {domain.name}: a backup needs QEMU {text(QEMU)} at least; {text(qemu)} is here", "Upgrade it."
        )
    return {"libvirt": text(libvirt), "qemu": text(qemu)}


def require(connection: Connection, domain: Domain) -> dict[str, str]:
    """The versions that take part in a backup of this VM. UnsupportedOperation, naming them, if they cannot do it.

    What counts is whether libvirt says that it can: 7.6 with QEMU 6.1 are the first that have it switched on
    everywhere, distributions have older ones that can do it.
    """
    libvirt, qemu = connection.libvirt_version(), qemu_of(domain)
    found = f"libvirt {text(libvirt)} and QEMU {text(qemu)} are here"
    if libvirt < LIBVIRT or qemu < QEMU:
        raise UnsupportedOperation(
            f"VM {domain.name}: a live backup needs libvirt {text(LIBVIRT)} and QEMU {text(QEMU)} at least; {found}",
            "Upgrade them, and restart the VM so that it runs in the new QEMU.",
        )
    definition = parse(domain.live_xml())
    os_type = definition.find("./os/type")
    assert os_type is not None  # libvirt fills it in
    offered = parse(
        connection.domain_capabilities(
            definition.findtext("./devices/emulator", ""),
            os_type.get("arch", ""),
            os_type.get("machine", ""),
            definition.get("type", ""),
        )
    ).find("./features/backup")
    if offered is None or offered.get("supported") != "yes":
        raise UnsupportedOperation(
            f"VM {domain.name}: this libvirt does not offer backups with checkpoints; {found}",
            "The first releases that have them switched on are libvirt 7.6 and QEMU 6.1.",
        )
    return {"libvirt": text(libvirt), "qemu": text(qemu)}
