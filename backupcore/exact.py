"""A stored artifact as its reader gets it: exactly as long as it has promised, and with errors of the taxonomy only."""

from __future__ import annotations

import io
from typing import Any, BinaryIO

from backupcore.context import Context
from backupcore.errors import ContractViolation, IntegrityError
from backupcore.model import Artifact
from backupcore.strays import translated

__all__ = ["Exact"]


class Exact(Artifact):
    """`inner`, an artifact of a driver's. Pickled, it leaves the context behind.

    `place` says where it lies (``nas:TOKEN``), `whose` it is: ``driver restic of datastore nas``.
    """

    def __init__(self, inner: Artifact, *, name: str, size: int, place: str, whose: str, ctx: Context | None) -> None:
        self._inner = inner
        self._what = f"{place}//{name}"
        self._whose = whose
        self._ctx = ctx
        self.name = name
        self.size = size
        self.seekable = bool(inner.seekable)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ctx": None}

    def open(self) -> BinaryIO:
        """A stream from byte 0."""
        with translated(self._whose, f"reading {self._what}"):
            inner = self._inner.open()
        if not callable(getattr(inner, "read", None)) or not callable(getattr(inner, "close", None)):
            raise ContractViolation(f"{self._whose}: open of {self._what} returned {type(inner).__name__}, no stream")
        made = _ExactStream(inner, self.size, self._what, whose=self._whose, ctx=self._ctx)
        return io.BufferedReader(made, 1 << 20)

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly that range, or what is left of it before the end."""
        if self._ctx is not None:
            self._ctx.check()
        with translated(self._whose, f"reading {self._what}"):
            data = self._inner.read_at(offset, length)
            if not isinstance(data, bytes | bytearray | memoryview):
                raise ContractViolation(f"read_at returned {type(data).__name__}")
        self._exactly(offset, length, len(data))
        return data

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """As `read_at`, into memory that is given."""
        if self._ctx is not None:
            self._ctx.check()
        with translated(self._whose, f"reading {self._what}"):
            count = self._inner.read_into(offset, buffer)
            if type(count) is not int:
                raise ContractViolation(f"read_into returned {type(count).__name__}")
        self._exactly(offset, len(buffer), count)
        return count

    def close(self) -> None:
        """Let go of what the driver's artifact holds."""
        with translated(self._whose, f"closing {self._what}"):
            self._inner.close()

    def _exactly(self, offset: int, length: int, count: int) -> None:
        if count != max(0, min(length, self.size - offset)):
            raise IntegrityError(f"{self._what}: {count} bytes at {offset} instead of {length}")


class _ExactStream(io.RawIOBase):
    def __init__(self, inner: BinaryIO, size: int, what: str, *, whose: str, ctx: Context | None) -> None:
        super().__init__()
        self._inner = inner
        self._left = size
        self._what = what
        self._whose = whose
        self._ctx = ctx

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # Buffer has no length
        if self._ctx is not None:
            self._ctx.check()
        with translated(self._whose, f"reading {self._what}"):
            data = self._inner.read(len(buffer))
            if not isinstance(data, bytes | bytearray | memoryview):
                raise ContractViolation(f"read returned {type(data).__name__}")
            if len(data) > len(buffer):
                raise ContractViolation(f"read gave {len(data)} bytes where {len(buffer)} were asked for")
        if not data and self._left:
            raise IntegrityError(f"{self._what} ends {self._left} bytes early", "Verify the image.")
        if len(data) > self._left:
            raise IntegrityError(f"{self._what} is longer than it promised", "Verify the image.")
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            with translated(self._whose, f"closing {self._what}"):
                self._inner.close()
