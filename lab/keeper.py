"""The parent of a libvirtd where no systemd runs: `python -m lab.keeper`.

It ends when it is told to (SIGTERM) or when libvirtd ends, and takes virtlogd and libvirtd with it. libvirtd's QEMU
processes become its children when they detach, and it collects them at once: libvirt waits for a destroyed VM until
the process is collected, and the first process of many containers takes seconds for that.

With --hide-kvm it must run in a mount namespace of its own.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

from lab.places import LAB

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_VIRTLOGD_SOCKET = "/run/libvirt/virtlogd-sock"


class _Stopped(Exception):
    pass


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise _Stopped


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, _stop)
    if "--hide-kvm" in sys.argv:
        hide_kvm()
    children = []
    try:
        if not _answers(_VIRTLOGD_SOCKET):
            children.append(_start("virtlogd"))
        children.append(_start("libvirtd"))
        while os.wait()[0] != children[-1].pid:
            pass
    except _Stopped:
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for child in reversed(children):  # libvirtd first: it talks to virtlogd
            child.terminate()
            child.wait()


def _start(program: str) -> subprocess.Popen[bytes]:
    # setpriv: should the keeper be killed, its daemons end as well.
    return subprocess.Popen(["setpriv", "--pdeathsig", "TERM", program, "-p", str(LAB / f"{program}.pid")])


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


def hide_kvm() -> None:
    """Give this mount namespace a /dev like the host's, but without kvm (`lab.kvm` says why).

    A file bound over /dev/kvm would not do: libvirt moves every mount below /dev into QEMU's own /dev, and fails on a
    file. For the same reason the old /dev has to go: mounts hidden below the new one would be moved, too.
    """
    new = Path(tempfile.mkdtemp(prefix="dev-", dir=LAB))
    _run("mount", "-t", "tmpfs", "-o", "mode=755", "dev", str(new))
    for entry in os.scandir("/dev"):
        if os.path.ismount(entry.path) and entry.is_dir():
            (new / entry.name).mkdir()
            _run("mount", "--rbind", entry.path, str(new / entry.name))
        elif entry.name != "kvm":
            _run("cp", "-a", entry.path, str(new / entry.name))
    _run("umount", "--recursive", "--lazy", "/dev")
    _run("mount", "--move", str(new), "/dev")
    shutil.rmtree(new, ignore_errors=True)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
