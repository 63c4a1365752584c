"""A libvirtd of a test's own, which it may kill and start again: `with PrivateLibvirtd(folder) as daemon: ...`.

It lives in a mount namespace, with its own configuration, state and runtime folders, beside the one that `lab.libvirtd`
starts. Only root can have one. Its VMs are not seen by the other one, and end with it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import libvirt

from lab import kvm
from lab.keeper import PR_SET_CHILD_SUBREAPER, hide_kvm
from lab.patience import patient
from lab.places import LAB, ROOT

_LIMIT = 60.0
_OWN = ("/etc/libvirt", "/var/lib/libvirt", "/run/libvirt")
_CONFIGURATION = ("libvirtd.conf", "qemu.conf", "virtlogd.conf")


class PrivateLibvirtd:
    """`folder` is for its files, and open to QEMU's user; `uri` is where it answers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._hold = folder / "hold"
        self.runtime = folder / f"own{_OWN.index('/run/libvirt')}"
        """What it has as /run/libvirt."""
        self.uri = f"qemu+unix:///system?socket={folder}/socket/libvirt-sock"

    def __enter__(self) -> Self:
        (self._folder / "socket").mkdir(parents=True)
        command = ["unshare", "--mount", "--propagation", "slave", sys.executable, "-m", "lab.private_libvirtd"]
        with (self._folder / "log").open("w") as log:
            self._parent = subprocess.Popen([*command, str(self._folder)], cwd=ROOT, stdout=log, stderr=log)
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def kill(self) -> None:
        """kill -9; it stays away until `start`."""
        self._hold.touch()
        pid = int((self._folder / "libvirtd.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + patient(_LIMIT)
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def start(self) -> None:
        """Start it again, and wait until it answers."""
        self._hold.unlink()
        self._wait_until_it_answers()

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + patient(_LIMIT)
        while True:
            try:
                libvirt.open(self.uri).close()
            except libvirt.libvirtError as error:
                if self._parent.poll() is not None or time.monotonic() > deadline:
                    raise TimeoutError(f"{error}\n{(self._folder / 'log').read_text()[-2000:]}") from error
            else:
                return
            time.sleep(0.05)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hold.exists():
            self.start()
        with suppress(libvirt.libvirtError):  # it may not have come up at all
            connection = libvirt.open(self.uri)
            for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                domain.destroy()
        self._parent.terminate()
        self._parent.wait(_LIMIT)


class _Stopped(Exception):
    pass


def _stop(*_: object) -> None:
    raise _Stopped


def main(folder: Path) -> None:
    """In a mount namespace of its own: start both daemons, and start libvirtd again whenever it ends."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, _stop)
    for number, place in enumerate(_OWN):
        own = folder / f"own{number}"
        own.mkdir()
        own.chmod(0o755)
        if place == "/etc/libvirt":
            for name in _CONFIGURATION:
                shutil.copy(Path(place, name), own)
            with (own / "libvirtd.conf").open("a") as file:
                file.write(f'\nunix_sock_dir = "{folder}/socket"\nauth_unix_rw = "none"\n')
        subprocess.run(["mount", "--bind", str(own), place], check=True)
    if kvm.closed_to("libvirt-qemu"):
        LAB.mkdir(exist_ok=True)
        hide_kvm()
    children = {"virtlogd": _start("virtlogd", folder), "libvirtd": _start("libvirtd", folder)}
    try:
        while True:
            os.wait()  # also QEMU's processes, which become ours when they detach
            while (folder / "hold").exists():
                time.sleep(0.02)
            if not _lives(children["libvirtd"]):
                (folder / "libvirtd.pid").unlink(missing_ok=True)
                children["libvirtd"] = _start("libvirtd", folder)
    except _Stopped:
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for child in reversed(children.values()):
            child.terminate()
            child.wait()


def _lives(child: subprocess.Popen[bytes]) -> bool:
    return Path(f"/proc/{child.pid}").exists()  # one that has ended was collected


def _start(program: str, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["setpriv", "--pdeathsig", "KILL", program, "-p", str(folder / f"{program}.pid")])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
