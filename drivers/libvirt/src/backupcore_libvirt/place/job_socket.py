"""The socket of a backup job: which place it gets, and how it goes again."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from backupcore.errors import HypervisorError, from_os_error
from backupcore_libvirt.connection import Domain
from backupcore_libvirt.folder import SOCKET_PATH_LIMIT, RunFolder
from backupcore_libvirt.place.qemu_process import qemu_process
from backupcore_libvirt.place.vm_folder import vm_folder

__all__ = ["JobSocket", "job_socket", "remove_sockets"]


@dataclass(frozen=True, slots=True)
class JobSocket:
    """Where QEMU is to listen, and its process: all VMs' QEMUs are one user, so another could listen in its place.

    `peer` is None where the process is not known.
    """

    path: Path
    peer: int | None


def job_socket(domain: Domain, folder: RunFolder) -> JobSocket:
    """The place for a run's socket: the VM's own folder, where QEMU is always allowed to make one; else the run's."""
    own = vm_folder(domain)
    path = own / folder.socket_name if own is not None else None
    if path is None or len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
        path = folder.socket
    return JobSocket(path, qemu_process(domain))


def remove_sockets(domain: Domain, folder: RunFolder) -> None:
    """Remove the socket of a run whose job is over from the folder of the running VM, should QEMU have left it.

    Nothing else is touched there: the folder is libvirt's. What lies in the run's folder goes with that.
    """
    own = vm_folder(domain)
    if own is None:
        return
    try:
        handle = os.open(own, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            with suppress(FileNotFoundError):
                if not stat.S_ISSOCK(os.stat(folder.socket_name, dir_fd=handle, follow_symlinks=False).st_mode):
                    raise HypervisorError(f"{own / folder.socket_name} is no socket, and stays")
                os.unlink(folder.socket_name, dir_fd=handle)
        finally:
            os.close(handle)
    except FileNotFoundError:
        return  # the VM has ended, and its folder with it
    except OSError as error:
        raise from_os_error(error, f"the folder of VM {domain.name}") from error
