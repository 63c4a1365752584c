"""Artifacts for tests: contents made from a rule, and ones that wait, fail or lie at a byte of your choice.

All of them can be pickled and read in another process, as the file view does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import BinaryIO

from backupcore.errors import HypervisorError
from backupcore.model import Artifact, itself, stream

__all__ = ["Failing", "Held", "Lying", "Made", "Sparse", "Watched", "gone"]

_BLOCK = 64 << 10
_ZEROS = bytes(1 << 20)
_PATIENCE = 120.0  # seconds that a held read waits: nobody may hang for ever because a test has failed


class _Readable(Artifact):
    def open(self) -> BinaryIO:
        """A sequential stream by way of `read_at`."""
        return stream(self)


@dataclass(frozen=True)
class Made(_Readable):
    """`size` bytes that depend on `seed` and on their place; of every `every` blocks of 64 KiB one is not zero."""

    name: str
    size: int
    seed: int = 0
    every: int = 1

    def read_at(self, offset: int, length: int) -> bytes:
        """Made when they are read."""
        end = min(offset + length, self.size)
        if offset >= end:
            return b""
        first, last = offset // _BLOCK, -(-end // _BLOCK)
        data = b"".join(self._block(number) for number in range(first, last))
        return data[offset - first * _BLOCK : end - first * _BLOCK]

    def _block(self, number: int) -> bytes:
        if number % self.every:
            return bytes(_BLOCK)
        return Random(f"{self.seed} {number}").randbytes(_BLOCK)  # noqa: S311 - no secret, it must come out again


@dataclass(frozen=True)
class Sparse(_Readable):
    """`size` bytes that are zeros but for some blocks: at the begin, around 32 MiB, 2 and 4 GiB, half, and the end."""

    name: str
    size: int

    @property
    def places(self) -> tuple[int, ...]:
        """Where the blocks of 64 KiB begin that are not zeros; all are odd, and some lie across a border."""
        borders = (0, 32 << 20, self.size // 2, 2 << 30, 4 << 30)
        found = {max(0, border - _BLOCK // 2 - 1) for border in borders if border < self.size}
        return tuple(sorted({*found, max(0, self.size - _BLOCK)}))

    def read_at(self, offset: int, length: int) -> bytes:
        """Made when they are read; zeros cost next to nothing."""
        length = max(0, min(length, self.size - offset))
        touched = [place for place in self.places if place < offset + length and offset < place + _BLOCK]
        if not touched:
            return _ZEROS[:length] if length <= len(_ZEROS) else bytes(length)
        data = bytearray(length)
        for place in touched:
            block = Random(f"{self.name} {place}").randbytes(_BLOCK)  # noqa: S311 - as above
            first, last = max(offset, place), min(offset + length, place + _BLOCK, self.size)
            data[first - offset : last - offset] = block[first - place : last - place]
        return bytes(data)


class Watched(_Readable):
    """`inner`; `ended` is set once its last byte was read."""

    def __init__(self, inner: Artifact) -> None:
        self.inner = inner
        self.name = inner.name
        self.size = inner.size
        self.ended = threading.Event()

    def read_at(self, offset: int, length: int) -> bytes:
        """What `inner` has."""
        data = self.inner.read_at(offset, length)
        if offset + length >= self.size:
            self.ended.set()
        return data

    def __reduce__(self) -> tuple[Callable[[Artifact], Artifact], tuple[Artifact]]:
        return itself, (self.inner,)


@dataclass(frozen=True)
class Held(_Readable):
    """`inner`, whose reads of byte `at` wait in `folder`: they make ``reached`` there and wait for ``go``."""

    inner: Artifact
    at: int
    folder: Path

    @property
    def name(self) -> str:  # type: ignore[override]  # read-only here: that of `inner`
        """That of `inner`."""
        return self.inner.name

    @property
    def size(self) -> int:  # type: ignore[override]  # as above
        """That of `inner`."""
        return self.inner.size

    @property
    def reached(self) -> bool:
        """Whether a read has come as far as `at`."""
        return (self.folder / "reached").exists()

    def let_go(self) -> None:
        """Let all reads go on."""
        (self.folder / "go").touch()

    def read_at(self, offset: int, length: int) -> bytes:
        """HypervisorError if nobody lets go for two minutes."""
        if offset <= self.at < offset + length:
            (self.folder / "reached").touch()
            end = time.monotonic() + _PATIENCE
            while not (self.folder / "go").exists():
                if time.monotonic() > end:
                    raise HypervisorError("a read that a test holds was never let go")
                time.sleep(0.005)
        return self.inner.read_at(offset, length)


@dataclass(frozen=True)
class Failing(_Readable):
    """`inner`, of which byte `at` and all after it cannot be read: the guest's disk is gone."""

    inner: Artifact
    at: int

    @property
    def name(self) -> str:  # type: ignore[override]  # read-only here: that of `inner`
        """That of `inner`."""
        return self.inner.name

    @property
    def size(self) -> int:  # type: ignore[override]  # as above
        """That of `inner`."""
        return self.inner.size

    def read_at(self, offset: int, length: int) -> bytes:
        """HypervisorError (the one of `gone`) from byte `at` on."""
        if offset + length > self.at:
            raise gone()
        return self.inner.read_at(offset, length)


@dataclass(frozen=True)
class Lying(_Readable):
    """`inner`, which says that it has `size` bytes."""

    inner: Artifact
    size: int

    @property
    def name(self) -> str:  # type: ignore[override]  # read-only here: that of `inner`
        """That of `inner`."""
        return self.inner.name

    def read_at(self, offset: int, length: int) -> bytes:
        """What `inner` has."""
        return self.inner.read_at(offset, length)


def gone() -> HypervisorError:
    """The error of a `Failing` read."""
    return HypervisorError("the guest's disk cannot be read any more", "This is a test.")
