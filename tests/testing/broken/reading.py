"""Artifacts that cannot be read as others expect it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import backupcore
from backupcore import hookimpl
from tests.testing.broken.traces import child
from tests.testing.folder import Folder, StoredFile


class Shifted(StoredFile):
    def read_at(self, offset: int, length: int) -> bytes:
        return (
            super().read_at(max(0, offset - 1), length)
            if offset + length < self.size
            else super().read_at(offset, length)
        )


class Unbounded(StoredFile):
    def read_at(self, offset: int, length: int) -> bytes:
        if offset >= self.size:
            raise EOFError("nothing there")
        return super().read_at(offset, length)


@dataclass(frozen=True)
class Shared(StoredFile):
    """All its streams share one place in the file."""

    file: list[BinaryIO] = field(default_factory=list)

    def open(self) -> BinaryIO:
        if not self.file or self.file[0].closed:
            self.file[:] = [self.path.open("rb", buffering=0)]
        return Borrowed(self.file[0])  # type: ignore[return-value]  # it has what is needed of a stream

    def __reduce__(self):
        return type(self), (self.path,)


class Borrowed:
    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def read(self, count: int = -1) -> bytes:
        time.sleep(0.001)
        return self.file.read(count)

    def close(self) -> None:
        pass


class FragileStream(Borrowed):
    """Cannot be closed before its end."""

    def close(self) -> None:
        rest = self.file.read(1)
        self.file.close()
        if rest:
            raise RuntimeError("closed before its end")


class Fragile(StoredFile):
    def open(self) -> BinaryIO:
        return FragileStream(self.path.open("rb"))  # type: ignore[return-value]  # as above


class Piped(StoredFile):
    """Reads through a program that nobody ends."""

    def open(self) -> BinaryIO:
        child()
        return super().open()


class Locked(StoredFile):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        object.__setattr__(self, "lock", threading.Lock())


class Elsewhere(StoredFile):
    """What it was opened with does not go along to another process."""

    def __reduce__(self):
        return type(self), (self.path.parent / "elsewhere" / self.path.name,)


def giving(kind: type[StoredFile]) -> type:
    """A folder whose artifacts are of this kind."""

    @backupcore.driver
    class Giving(Folder):
        @hookimpl
        def restore(self, source, ctx):
            return [kind(one.path) for one in Folder.restore(self, source, ctx)]

    return Giving
