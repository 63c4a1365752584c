"""Make sure that a libvirtd answers, and stop it again if it was started here.

As root this is qemu:///system; for anybody else qemu:///session, which libvirt starts by itself. Where systemd runs,
libvirtd is systemd's affair. Elsewhere (a container) virtlogd and libvirtd are started below a process of ours
(lab/keeper.py), whose end ends exactly those two.

    python -m lab.libvirtd          start, print the URI
    python -m lab.libvirtd stop     stop what was started here, if anything
"""

from __future__ import annotations

import os
import pwd
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import libvirt

from lab import kvm
from lab.places import LAB, ROOT, locked, vm_folder

_PID_FILE = LAB / "keeper.pid"
_LOG_FILE = LAB / "keeper.log"
_START_SECONDS = 60
_STOP_SECONDS = 30

# Without this libvirt prints every error to stderr before it raises it.
libvirt.registerErrorHandler(lambda _context, _error: None, None)


class LibvirtMissing(Exception):
    """No libvirtd answers and none may be started here; the text says what to do."""


def uri() -> str:
    """The libvirt that this user's VMs belong to."""
    return "qemu:///system" if os.geteuid() == 0 else "qemu:///session"


def ensure() -> str:
    """Have a libvirtd that answers, and return its URI.

    Raises `LibvirtMissing` where none answers and systemd, not the lab, has to start it.
    """
    with locked("libvirtd"):
        reason = _silent()
        if reason is None:
            return uri()
        if os.geteuid() != 0:
            raise LibvirtMissing(f"{uri()} does not answer: {reason}. Are the packages of 'make setup' installed?")
        if Path("/run/systemd/system").exists():
            raise LibvirtMissing(f"{uri()} does not answer: {reason}. Start it:  systemctl start libvirtd")
        _start()
        return uri()


def started_here() -> bool:
    """Whether the libvirtd that answers was started by `ensure` (of any process of this checkout)."""
    return keeper() is not None


def stop() -> None:
    """Stop the libvirtd and virtlogd that `ensure` started; does nothing where they were not ours."""
    with locked("libvirtd"):
        process = keeper()
        if process is None:
            return
        os.kill(process, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_SECONDS
        while keeper() is not None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"libvirtd (below process {process}) did not stop in {_STOP_SECONDS} s")
            time.sleep(0.05)
        _PID_FILE.unlink(missing_ok=True)


@contextmanager
def running() -> Iterator[str]:
    """The URI of a libvirtd that answers; at the end it is stopped if this call started it."""
    was_ours = started_here()
    try:
        yield ensure()
    finally:
        if not was_ours:
            stop()


def folder_for_vms() -> Path:
    """The folder for disks, sockets and scratch files of the lab's VMs; see `lab.places`."""
    return vm_folder(_qemu_user)


def _silent() -> str | None:
    try:
        libvirt.open(uri()).close()
    except libvirt.libvirtError as error:
        return str(error)
    return None


def _start() -> None:
    command = [sys.executable, "-m", "lab.keeper"]
    if kvm.closed_to("libvirt-qemu"):
        # A mount namespace: the keeper changes libvirtd's view of /dev, and the host's must stay as it is.
        command = ["unshare", "--mount", "--propagation", "slave", *command, "--hide-kvm"]
    with _LOG_FILE.open("w") as log:
        child = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    _PID_FILE.write_text(f"{child.pid}\n")
    deadline = time.monotonic() + _START_SECONDS
    while (reason := _silent()) is not None:
        if child.poll() is not None or time.monotonic() > deadline:
            child.terminate()
            raise LibvirtMissing(f"libvirtd could not be started: {reason}\n{_LOG_FILE.read_text()[-2000:]}")
        time.sleep(0.05)


def keeper() -> int | None:
    """The process ID of the parent of our libvirtd (`lab.keeper`) while it runs; else None.

    A recorded ID may have gone to another process: its command decides.
    """
    try:
        pid = int(_PID_FILE.read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if b"lab.keeper" in command else None  # a zombie's command is empty


def _qemu_user() -> tuple[int, int]:
    """The uid and gid that libvirt runs QEMU as, in its own words."""
    connection = libvirt.open(uri())
    try:
        found = re.search(r"<baselabel type='(?:qemu|kvm)'>\+(\d+):\+(\d+)</baselabel>", connection.getCapabilities())
    finally:
        connection.close()
    if found is not None:
        return int(found[1]), int(found[2])
    account = pwd.getpwnam("libvirt-qemu")
    return account.pw_uid, account.pw_gid


if __name__ == "__main__":
    if sys.argv[1:] == ["stop"]:
        stop()
    else:
        print(ensure())
