"""Disks and artifacts that misbehave on purpose; a module of their own, so that a view's process can unpickle them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from backupcore.disk.extents import CLUSTER, Extent, Kind
from backupcore.disk.nbd import Address, Client
from backupcore.disk.qcow2 import DiskArtifact, Layout, MemoryBlocks
from backupcore.disk.sums import SumsArtifact
from backupcore.errors import BackupError, TargetUnavailable
from backupcore.model import Artifact, stream

MIB = 1 << 20


def disk(name: str, size: int, *, seed: int = 0, blocks: Any = None) -> DiskArtifact:
    """A disk of `size` bytes, all of them data but the third cluster, of which the file says nothing."""
    whole = -(-size // CLUSTER) * CLUSTER
    extents = [Extent(0, min(whole, 2 * CLUSTER), Kind.DATA)]
    if whole > 3 * CLUSTER:
        extents.append(Extent(3 * CLUSTER, whole - 3 * CLUSTER, Kind.DATA))
    return DiskArtifact(name, Layout(size, extents), blocks or MemoryBlocks(content(size, seed)))


def content(size: int, seed: int = 0) -> bytes:
    """Bytes that differ from cluster to cluster and from seed to seed."""
    words = b"".join(b"%08d%08d" % (seed, at) * (512 // 16) for at in range(0, size, 512))
    return words[:size]


class Counting(MemoryBlocks):
    """Counts the bytes that are read from each offset on, in this process."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.asked: list[tuple[int, int]] = []

    def connect(self) -> Counting:
        return self

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.asked.append((offset, len(buffer)))
        super().read_into(offset, buffer)


class Failing(MemoryBlocks):
    """Fails for every read past `good` bytes, with an error of `kind`."""

    def __init__(self, data: bytes, good: int, kind: type[Exception] = TargetUnavailable) -> None:
        super().__init__(data)
        self.good = good
        self.kind = kind

    def connect(self) -> Failing:
        return self

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset + len(buffer) > self.good:
            raise self.kind(f"nothing can be read past {self.good}")
        super().read_into(offset, buffer)


class Changing(MemoryBlocks):
    """Gives other bytes each time."""

    def connect(self) -> Changing:
        return self

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = os.urandom(len(buffer))


class Hanging(MemoryBlocks):
    """Answers no read until it is closed, like a server that is gone."""

    def connect(self) -> Hanging:
        self.closed = threading.Event()
        return self

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.closed.wait()
        raise TargetUnavailable("the connection was closed")

    def close(self) -> None:
        self.closed.set()


class Murderous(MemoryBlocks):
    """Kills the process that reads it, and leaves its number in a file."""

    def __init__(self, note: Path) -> None:
        super().__init__(b"")
        self.note = note

    def connect(self) -> Murderous:
        return self

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.note.write_text(str(os.getpid()))
        os.kill(os.getpid(), 9)


class Export:
    """A disk on an NBD server."""

    def __init__(self, address: Address) -> None:
        self.address = address

    def connect(self) -> Client:
        return Client(self.address)


class Digests(Artifact):
    """Stands in for the manifest: the digests of several sums, as hex."""

    def __init__(self, name: str, sums: Sequence[SumsArtifact]) -> None:
        self.name = name
        self.size = 64 * len(sums)
        self._sums = sums

    def open(self) -> BinaryIO:
        return stream(self)

    def read_at(self, offset: int, length: int) -> bytes:
        return "".join(sums.digest().hex() for sums in self._sums).encode()[offset : offset + length]


class Noted(Artifact):
    """Zeros; writes down the length of every read."""

    def __init__(self, name: str, size: int, note: Path) -> None:
        self.name = name
        self.size = size
        self._note = note

    def open(self) -> BinaryIO:
        return stream(self)

    def read_at(self, offset: int, length: int) -> bytes:
        with self._note.open("a") as note:
            note.write(f"{length}\n")
        return bytes(length)


class Odd(Artifact):
    """Does what `act` says when it is read: "short", "long", "bug", "os", "custom"; "unpickle" when it is unpickled."""

    def __init__(self, name: str, size: int, act: str) -> None:
        self.name = name
        self.size = size
        self._act = act

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["_act"] == "unpickle":
            raise LookupError("no such thing here")
        self.__dict__.update(state)

    def open(self) -> BinaryIO:
        return stream(self)

    def read_at(self, offset: int, length: int) -> bytes:
        match self._act:
            case "short":
                return bytes(max(0, min(length, self.size - offset) - 1))
            case "long":
                return bytes(length + 1)
            case "os":
                raise OSError(5, "Input/output error", "/some/where")
            case "custom":
                raise Custom(1, 2)
        raise ZeroDivisionError("a bug")


class Custom(BackupError):
    """An error that does not survive being pickled."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"custom {one + two}", "a hint")
        self.args = ("too", "many", "arguments")


class Slow(MemoryBlocks):
    """Takes a moment for each read."""

    def connect(self) -> Slow:
        return self

    def read_into(self, offset: int, buffer: memoryview) -> None:
        time.sleep(0.02)
        super().read_into(offset, buffer)


def complain(kind: type[BaseException], *arguments: object) -> None:
    """Raise it."""
    raise kind(*arguments)


def lock() -> object:
    """What cannot be pickled."""
    return threading.Lock()


class FailsThere(Slow):
    """Fails for the read at `bad`; all others take their time."""

    def __init__(self, data: bytes, bad: int) -> None:
        super().__init__(data)
        self.bad = bad

    def connect(self) -> FailsThere:
        return self

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset == self.bad:
            raise TargetUnavailable("nothing can be read there")
        super().read_into(offset, buffer)
