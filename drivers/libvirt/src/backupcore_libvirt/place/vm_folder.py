"""The folder that libvirt makes for a running VM alone: ``/var/lib/libvirt/qemu/domain-ID-NAME``.

QEMU's monitor has its socket there, so every VM's profile lets QEMU make sockets in it: AppArmor's by name (libvirt 9.0
and 11.3, tried), SELinux' by its label. The way to it is QEMU's own word, since libvirt shortens names and has another
folder for each user's session.
"""

from __future__ import annotations

import stat
from pathlib import Path

from backupcore.errors import BackupError
from backupcore_libvirt.connection import Domain

__all__ = ["vm_folder"]

_MONITOR = "charmonitor"  # libvirt's name for it
_PREFIX = "unix:"


def vm_folder(domain: Domain) -> Path | None:
    """The folder of a running VM; None where QEMU does not tell, or where we do not see what QEMU sees there.

    The daemon may live in another mount namespace, a container for example.
    """
    try:
        found = domain.query("query-chardev")
    except BackupError:
        return None
    for device in found:
        if device.get("label") != _MONITOR:
            continue
        # disconnected:unix:/var/lib/libvirt/qemu/domain-1-web1/monitor.sock,server=on
        _, prefix, rest = str(device.get("filename", "")).partition(_PREFIX)
        socket = Path(rest.rpartition(",server")[0] or rest)
        if prefix and socket.is_absolute() and _is_socket(socket):
            return socket.parent
    return None


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.lstat().st_mode)
    except OSError:
        return False
