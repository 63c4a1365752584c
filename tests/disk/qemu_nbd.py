"""A real `qemu-nbd` for tests: one image, served read-only on a unix socket for as long as a `with` block lasts."""

from __future__ import annotations

import gc
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from backupcore.disk.nbd import Address

LIMIT = 20.0
"""Seconds within which a program that works has started or ended, on a busy machine too."""


def descriptors() -> frozenset[str]:
    """What this process has open: number and file of each, which names a pipe or a socket for good.

    What other tests have left to the garbage collector is not among them.
    """
    gc.collect()
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one of this very listing
            found.add(f"{entry.name} {entry.readlink()}")
    return frozenset(found)


def run(*command: str | Path) -> str:
    """Run one of QEMU's programs to its end; its output. An error shows what it said."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


class QemuNbd:
    """`with QemuNbd(image, "qcow2", bitmaps=["b0"]) as server: Client(server.address, ...)`.

    `image` is a path, or with `form` None the text of ``--image-opts``. `clients` may be connected at once.
    """

    def __init__(
        self, image: Path | str, form: str | None, *, bitmaps: Sequence[str] = (), export: str = "", clients: int = 8
    ) -> None:
        # A folder of its own with a short name: pytest's are too long for a socket.
        self._folder = tempfile.TemporaryDirectory(prefix="nbd-")
        self.address = Address(str(Path(self._folder.name, "s")), export)
        self._command = ["qemu-nbd", "-r", "-t", "-e", str(clients), "-k", self.address.socket, "-x", export]
        self._command += [f"--bitmap={name}" for name in bitmaps]
        self._command += [str(image), "--image-opts"] if form is None else ["-f", form, str(image)]

    @property
    def pid(self) -> int:
        """The process of the server."""
        return self._process.pid

    def __enter__(self) -> Self:
        ready = Path(self._folder.name, "pid")
        log = Path(self._folder.name, "log")
        with log.open("wb") as output:
            self._process = subprocess.Popen([*self._command, "--pid-file", str(ready)], stderr=output)
        deadline = time.monotonic() + LIMIT
        while not ready.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                message = log.read_text()
                self.__exit__(None, None, None)
                raise AssertionError(f"qemu-nbd does not serve: {message}")
            time.sleep(0.005)
        return self

    def kill(self) -> None:
        """End the server as a crash would."""
        self._process.kill()
        self._process.wait(LIMIT)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self.kill()
        self._folder.cleanup()
