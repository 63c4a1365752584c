"""The process of a running VM's QEMU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from html import escape  # the one of xml.sax loads an HTTP client, a sixth of the guard's start
from pathlib import Path

from backupcore_libvirt.connection import Domain

__all__ = ["qemu_process"]

_LONGEST = 32  # bytes of a process number and what stands around it


def qemu_process(domain: Domain) -> int | None:
    """Its number; None where libvirt's record of it is not to be found.

    libvirt has no call that tells. Its daemon keeps the number in its runtime folder, to which QEMU's user cannot
    write; whether that process is this VM's its command line says, since a record may be of an earlier start.
    """
    for record in _records(domain.name):
        try:
            with os.fdopen(os.open(record, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                if os.fstat(file.fileno()).st_uid not in (0, os.geteuid()):
                    continue
                number = int(file.read(_LONGEST))
            arguments = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        if domain.uuid.encode() in arguments:  # after -uuid
            return number
    return None


def _records(name: str) -> Iterator[Path]:
    """Where libvirtd and virtqemud keep it: for the system, and for a user's session (as GLib finds its folder)."""
    # libvirt 9.0 calls it by the name as XML has it, with &apos; for a quote.
    for called in dict.fromkeys((name, escape(name).replace("&#x27;", "&apos;"))):
        if os.geteuid() == 0:
            yield Path(f"/run/libvirt/qemu/{called}.pid")
            continue
        for folder in (os.environ.get("XDG_RUNTIME_DIR"), os.environ.get("XDG_CACHE_HOME"), Path.home() / ".cache"):
            if folder:
                yield Path(folder, f"libvirt/qemu/run/{called}.pid")
