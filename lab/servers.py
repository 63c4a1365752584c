"""Servers for the tests of datastores: sshd, an rsync daemon and rclone on loopback, as whoever runs the tests.

They listen on free ports of 127.0.0.1, have keys and files of their own, and end with the block. Nothing is installed
and no file of the system is touched: openssh-server is unpacked below .lab/packages.
"""

from __future__ import annotations

import getpass
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lab.kernel import fetched
from lab.places import LAB, locked

_PATIENCE = 30.0
_SESSION = "usr/lib/openssh/sshd-session"
_AUTH = "usr/lib/openssh/sshd-auth"


@dataclass(frozen=True)
class Sshd:
    """A running sshd that lets this user in by `identity`. `known_hosts` holds its key."""

    port: int
    user: str
    identity: Path
    known_hosts: Path
    process: subprocess.Popen[bytes]

    @property
    def logins(self) -> int:
        """How many logins it has taken so far."""
        return (self.identity.parent / "log").read_text().count("Accepted publickey")

    @property
    def client(self) -> list[str]:
        """The words of an ssh command for it, without the host."""
        return [
            *("ssh", "-F", "none", "-p", str(self.port), "-i", str(self.identity), "-o", "BatchMode=yes"),
            *("-o", f"UserKnownHostsFile={self.known_hosts}", "-o", "StrictHostKeyChecking=yes"),
        ]

    def run(self, command: str) -> str:
        """Run a shell command over there: it may see other mounts than this process does."""
        line = [*self.client, f"{self.user}@127.0.0.1", command]
        return subprocess.run(line, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout


@contextmanager
def sshd(folder: Path, settings: str = "") -> Iterator[Sshd]:
    """An sshd with keys in `folder`, for the time of the block; sftp included. `settings` go into its configuration."""
    root = fetch()
    libraries = {
        path.parent for name in ("libwrap0", "libwtmpdb0") for path in (LAB / "packages" / name).rglob("*.so.*")
    }
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "authorized_keys").write_bytes((folder / "user.pub").read_bytes())
    port = free_port()
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized_keys\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPidFile none\n"
        "PermitRootLogin prohibit-password\nSubsystem sftp internal-sftp\nMaxStartups 100\n"
        + settings
        + _programs(root)
    )
    key = (folder / "host.pub").read_text().split()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {key[0]} {key[1]}\n")
    command = [str(root / "usr/sbin/sshd"), "-D", "-e", "-f", str(folder / "sshd_config")]
    if os.geteuid() == 0:
        command = _with_its_own_user(command, folder)
    environment = os.environ | {"LD_LIBRARY_PATH": ":".join(sorted(map(str, libraries)))}
    with (
        (folder / "log").open("wb") as log,
        _running(command, log, port, environment) as process,
    ):
        yield Sshd(port, getpass.getuser(), folder / "user", folder / "known_hosts", process)


def fetch() -> Path:
    """Unpack sshd and the libraries that nothing else of the host needs, where that is still to do; sshd's root."""
    with locked("sshd"):
        folder = LAB / "packages/openssh-server"
        if not (folder / "usr").exists():
            fetched("openssh-server")
        libraries = ["libwrap0"]
        if (folder / _SESSION).exists():  # OpenSSH of Debian 13 writes wtmp by a library of its own
            libraries.append("libwtmpdb0")
        for package in libraries:
            if not (LAB / "packages" / package / "usr").exists():
                fetched(package)
    return folder


def _programs(root: Path) -> str:
    """What newer OpenSSH must be told: where its further programs lie (9.8, 10.0), and not to punish failed logins."""
    if not (root / _SESSION).exists():
        return ""
    told = f"SshdSessionPath {root / _SESSION}\nPerSourcePenalties no\n"
    return told + (f"SshdAuthPath {root / _AUTH}\n" if (root / _AUTH).exists() else "")


def _with_its_own_user(command: Sequence[str], folder: Path) -> list[str]:
    """As root, sshd insists on a user and an empty folder of its own: it gets them in a mount namespace.

    There nobody's account is locked either, as root's is on many a host; without PAM sshd would let no key in.
    """
    (folder / "passwd").write_text(Path("/etc/passwd").read_text() + "sshd:x:65533:65534::/run/sshd:/bin/false\n")
    shadow = folder / "shadow"
    shadow.touch(mode=0o600)
    shadow.write_text(f"{getpass.getuser()}:*:19000:0:99999:7:::\n")
    mounts = "".join(f"mount --bind {shlex.quote(str(folder / name))} /etc/{name} && " for name in ("shadow", "passwd"))
    script = f"{mounts}mount -t tmpfs tmpfs /run && mkdir -m 0755 /run/sshd && exec " + shlex.join(command)
    return ["unshare", "--mount", "sh", "-c", script]


@contextmanager
def rsync_daemon(folder: Path, modules: str, *, program: str = "rsync") -> Iterator[int]:
    """An rsync daemon with these modules (text of an rsyncd.conf), for the time of the block; its port."""
    config = folder / "rsyncd.conf"
    config.write_text(f"use chroot = no\nlog file = {folder}/log\npid file = {folder}/pid\n{_identity()}{modules}")
    port = free_port()
    command = [program, "--daemon", "--no-detach", f"--config={config}", "--address=127.0.0.1", f"--port={port}"]
    with (folder / "stderr").open("wb") as log, _running(command, log, port, os.environ):
        yield port


@contextmanager
def rclone(folder: Path, *arguments: str) -> Iterator[int]:
    """What rclone serves of `folder` (``restic``, ``s3`` and their options), for the time of the block; its port."""
    with stoppable_rclone(folder, *arguments) as (port, _):
        yield port


@contextmanager
def stoppable_rclone(folder: Path, *arguments: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """The same with its process, which a test may have stand still."""
    port = free_port()
    program = Path(sys.executable).parent / "rclone"
    command = [str(program), "serve", *arguments, "--addr", f"127.0.0.1:{port}", str(folder)]
    environment = os.environ | {"RCLONE_CONFIG": os.devnull}
    with (folder.parent / f"{folder.name}.log").open("wb") as log, _running(command, log, port, environment) as process:
        yield port, process


@contextmanager
def silent() -> Iterator[int]:
    """A server that takes connections and never says a word, for the time of the block; its port."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(100)
        port: int = server.getsockname()[1]
        yield port


def _identity() -> str:
    return "uid = 0\ngid = 0\n" if os.geteuid() == 0 else ""


def free_port() -> int:
    """A port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _running(
    command: Sequence[str], log: IO[bytes], port: int, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
    )
    try:
        end = time.monotonic() + _PATIENCE
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > end:
                raise OSError(f"{command[0]} does not listen on port {port}: {Path(log.name).read_text()}")
            time.sleep(0.02)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
