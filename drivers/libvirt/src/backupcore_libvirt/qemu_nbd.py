"""Reading an image that no VM has open: `qemu-nbd`, read-only, on a unix socket in the run's folder.

While it serves an image QEMU's lock keeps everybody from opening it for writing: a VM with that disk cannot start. So
it never outlives its run: the kernel kills it with our process, and `release.servers` finds one that got away all the
same.
"""

from __future__ import annotations

import os
import stat
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from backupcore.disk.nbd import Address, Client, ConnectionLost, NbdError
from backupcore.errors import BackupError, Busy, HypervisorError, from_os_error
from backupcore_libvirt.release.servers import processes
from backupcore_libvirt.source import Part

__all__ = ["QemuNbd", "image_options", "is_locked", "is_served"]

START_LIMIT = 30.0
STOP_LIMIT = 5.0
_CLIENTS = 16

# The death signal comes when the *thread* that forked ends, so all are forked by one that lives as long as we do.
_forker = ThreadPoolExecutor(1, thread_name_prefix="fork-qemu-nbd")


def image_options(path: str | os.PathLike[str], shape: str, part: Part | None = None) -> str:
    """The ``--image-opts`` of an image, which is `part` of the file where that is given.

    Its format and file are named, so that nothing is guessed from its contents, and no path is taken for an option or a
    URL. The file's name comes last, see `is_served`.
    """
    name = os.fspath(path)
    driver = "host_device" if stat.S_ISBLK(Path(name).stat().st_mode) else "file"
    file = f"file.driver={driver},file.filename={name.replace(',', ',,')}"
    if part is None:
        return f"driver={shape},{file}"
    if shape == "raw":
        return f"driver=raw,offset={part.offset},size={part.size},{file}"
    return f"driver={shape},file.driver=raw,file.offset={part.offset},file.size={part.size}," + ",".join(
        f"file.{option}" for option in file.split(",", 1)
    )


def is_locked(message: str) -> bool:
    """Whether one of QEMU's programs said that another process has the image open."""
    return '" lock' in message


class QemuNbd:
    """One image, served until `stop`, the end of the ``with`` block, or the end of this process.

    `path` is a file or device of format `shape` (qcow2, raw), or `part` of it, with its backing chain below it;
    `socket` must not exist.
    `bitmaps` become contexts ``qemu:dirty-bitmap:NAME``, `depth` adds `nbd.DEPTH`. Building it does nothing.
    """

    def __init__(
        self,
        socket: Path,
        path: str | os.PathLike[str],
        shape: str,
        *,
        part: Part | None = None,
        bitmaps: Sequence[str] = (),
        depth: bool = False,
    ) -> None:
        self.address = Address(str(socket))
        """Where its one export is; its name is empty. Once it runs no other process is taken for it: the folder of the
        socket may be that of QEMU's user.
        """
        self._path = os.fspath(path)
        self._shape = shape
        self._part = part
        self._more = [f"--bitmap={name}" for name in bitmaps] + (["--allocation-depth"] if depth else [])
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers.

        Busy where another process has the image open for writing (its VM runs); HypervisorError, AccessDenied.
        """
        try:
            options = image_options(self._path, self._shape, self._part)
        except OSError as error:
            raise from_os_error(error, f"read {self._path}") from error
        # setpriv sets the death signal and becomes qemu-nbd; a function of ours between fork and exec could lock up.
        command = ["setpriv", "--pdeathsig", "KILL", "qemu-nbd", "--read-only", "--persistent", f"--shared={_CLIENTS}"]
        command += [f"--socket={self.address.socket}", *self._more, "--image-opts", options]
        errors = os.memfd_create("stderr")
        try:
            self._process = _forker.submit(_start, command, errors).result()
            self.address = replace(self.address, peer=self._process.pid)
            self._wait(self._process, errors)
        except BaseException:
            self.stop()
            raise
        finally:
            os.close(errors)

    def _wait(self, process: subprocess.Popen[bytes], errors: int) -> None:
        deadline = time.monotonic() + START_LIMIT
        while not self._answers():
            if process.poll() is not None:
                raise self._failed(os.pread(errors, 4096, 0).decode(errors="replace"))
            if time.monotonic() > deadline:
                raise HypervisorError(f"qemu-nbd does not answer within {START_LIMIT:.0f} s for {self._path}")
            time.sleep(0.005)

    def _answers(self) -> bool:
        if not Path(self.address.socket).exists():
            return False
        try:
            Client(self.address, timeout=START_LIMIT).close()
        except ConnectionLost:
            return False  # bound, and not listening yet
        except NbdError:
            self.stop()
            raise
        return True

    def _failed(self, said: str) -> BackupError:
        text = " ".join(line.removeprefix("qemu-nbd: ") for line in said.strip().splitlines())
        if is_locked(said):
            return Busy(
                f"{self._path} is open in another process: {text}",
                "Has its VM just been started? Run it again: it is then backed up while it runs.",
            )
        if said.startswith("setpriv:") and "qemu-nbd" in said:
            return HypervisorError(f"qemu-nbd cannot be run: {text}", "Install it (Debian, Ubuntu: qemu-utils).")
        return HypervisorError(f"qemu-nbd cannot serve {self._path}: {text or 'it ended without a word'}")

    def stop(self) -> None:
        """End it. Idempotent; connections to it break."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()  # it only reads: nothing is lost
            process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _start(command: Sequence[str], errors: int) -> subprocess.Popen[bytes]:
    try:
        # In a session of its own: a Ctrl-C on our terminal is not for it, we end it when nobody reads any more.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    except OSError as error:
        raise HypervisorError(f"{command[0]} cannot be run: {error.strerror}", "Install util-linux.") from error


def is_served(path: str) -> bool:
    """Whether a qemu-nbd of ours serves this image as the top of its chain: its VM cannot start then."""
    named = f"file.filename={path.replace(',', ',,')}".encode()
    for pid in processes():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended, or is not ours to look at
        if command[0].endswith(b"qemu-nbd") and any(argument.endswith(named) for argument in command):
            return True
    return False
