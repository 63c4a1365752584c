"""Artifacts that make trouble, in a module that the file view's process can import."""

from __future__ import annotations

import time
from pathlib import Path
from typing import BinaryIO

from backupcore.errors import HypervisorError, TargetUnavailable
from backupcore.model import Artifact, stream


class GatedArtifact(Artifact):
    """Zeros; a read of the second half waits until the file ``open`` is in `folder`, and makes the file ``reached``."""

    def __init__(self, name: str, size: int, folder: Path) -> None:
        self.name = name
        self.size = size
        self._folder = folder

    def open(self) -> BinaryIO:
        return stream(self)

    def read_at(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self.size - offset))
        if offset + length > self.size // 2:
            (self._folder / "reached").touch()
            end = time.monotonic() + 60
            while not (self._folder / "open").exists():
                if time.monotonic() > end:
                    raise TargetUnavailable("nobody opened the gate")
                time.sleep(0.01)
        return bytes(length)


class SlowArtifact(Artifact):
    """Zeros at some 10 MiB a second; the first read makes the file ``reached`` in `folder`."""

    def __init__(self, name: str, size: int, folder: Path) -> None:
        self.name = name
        self.size = size
        self._folder = folder

    def open(self) -> BinaryIO:
        return stream(self)

    def read_at(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self.size - offset))
        time.sleep(length / (10 << 20))
        (self._folder / "reached").touch()
        return bytes(length)


class BrokenArtifact(Artifact):
    """Zeros, the second half of which cannot be read."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size

    def open(self) -> BinaryIO:
        return stream(self)

    def read_at(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self.size - offset))
        if offset + length > self.size // 2:
            raise HypervisorError("the guest's disk is gone")
        return bytes(length)
