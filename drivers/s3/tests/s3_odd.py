"""Artifacts that make trouble, in a module that another process can import."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from backupcore.errors import HypervisorError, TargetUnavailable
from backupcore.model import Artifact, stream


class CallingArtifact(Artifact):
    """Zeros; `call` is called once a read goes past `at`."""

    def __init__(self, name: str, size: int, at: int, call: Callable[[], None]) -> None:
        self.name, self.size = name, size
        self._at, self._call = at, call

    def open(self) -> BinaryIO:
        return stream(self)

    def read_at(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self.size - offset))
        if length and offset + length > self._at:
            self._call()
        return bytes(length)


class GatedArtifact(Artifact):
    """Zeros; a read past `at` waits until the file ``open`` is in `folder`, and makes the file ``reached``."""

    def __init__(self, name: str, size: int, at: int, folder: Path) -> None:
        self.name, self.size = name, size
        self._at, self._folder = at, folder

    def open(self) -> BinaryIO:
        return stream(self)

    def read_at(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self.size - offset))
        if offset + length > self._at:
            (self._folder / "reached").touch()
            end = time.monotonic() + 120
            while not (self._folder / "open").exists():
                if time.monotonic() > end:
                    raise TargetUnavailable("nobody opened the gate")
                time.sleep(0.01)
        return bytes(length)


def broken() -> None:
    raise HypervisorError("the guest's disk is gone")
