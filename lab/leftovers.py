"""What a test process left behind: programs, mounts and VMs, told from those of others on the same machine.

Every program that a test starts inherits an environment variable, whatever becomes of it: detached daemons are found as
well (qemu-nbd --fork, a FUSE server). VMs are found by the prefix of their names, mounts by their place.
"""

from __future__ import annotations

import os
from pathlib import Path

MARKER = "VMKEEP_LAB_SESSION"
# They serve the session and end by themselves: Python's own aids, and the daemons that libvirt starts for a user.
_EXPECTED = (
    b"multiprocessing.resource_tracker",
    b"multiprocessing.forkserver",
    b"libvirtd",
    b"virtlogd",
    b"lab.keeper",
)


def processes(marker: str) -> list[str]:
    """Processes other than this one whose environment holds NAME=VALUE, each as "process 12: restic backup"."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            marked = marker.encode() in (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes()
        except OSError:  # it has ended, or is another user's
            continue
        if marked and not any(name in command for name in _EXPECTED):
            found.append(f"process {entry.name}: {command.replace(bytes(1), b' ').decode(errors='replace')}")
    return found


def mounts(*folders: Path) -> list[str]:
    """Mount points below these folders, each as "mount /tmp/x"."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [Path(line.split()[4].encode().decode("unicode_escape")) for line in lines]
    return [f"mount {point}" for point in points if any(point.is_relative_to(folder) for folder in folders)]


def domains(uri: str, prefix: str) -> list[str]:
    """VMs whose names begin with the prefix, each as "VM test-1-a"."""
    import libvirt  # noqa: PLC0415 - only where VMs were made

    connection = libvirt.open(uri)
    try:
        names = [domain.name() for domain in connection.listAllDomains()]
    finally:
        connection.close()
    return [f"VM {name}" for name in names if name.startswith(prefix)]
