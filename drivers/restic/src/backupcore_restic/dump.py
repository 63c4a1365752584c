"""What `restore` returns: artifacts that are streamed from ``restic dump`` when they are opened."""

from __future__ import annotations

import io
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, BinaryIO

from backupcore.errors import IntegrityError
from backupcore.model import Artifact
from backupcore_restic.repository import Repository

if TYPE_CHECKING:
    from backupcore import Context
    from backupcore_restic.driver import Restic

__all__ = ["DumpedArtifact"]


class DumpedArtifact(Artifact):
    """One file of a snapshot. Each `open` starts a restic of its own, which takes about as long as its key derivation.

    It pickles without its context: opened in another process, its restic ends with the stream or with that process.
    """

    seekable = False

    def __init__(self, options: Restic, snapshot: str, name: str, size: int, ctx: Context | None) -> None:
        self.name = name
        self.size = size
        self._options = options
        self._snapshot = snapshot
        self._ctx = ctx

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ctx": None}

    def open(self) -> BinaryIO:
        """The file from byte 0; a dump that fails, or is too short or too long, raises from the read that meets it."""
        stream = DumpStream(Repository(self._options), self._snapshot, self.name, self.size, self._ctx)
        return io.BufferedReader(stream, 1 << 20)


class DumpStream(io.RawIOBase):
    """The stdout of one ``restic dump``.

    The last bytes are handed over only once restic has ended well, so that `close` has nothing to report.
    """

    def __init__(self, repository: Repository, snapshot: str, name: str, size: int, ctx: Context | None) -> None:
        super().__init__()
        self._what = f"reading {name} of snapshot {snapshot[:8]} in {repository.name}"
        self._repository = repository
        self._ctx = ctx
        self._size = size
        self._count = 0
        self._ended = False
        with ExitStack() as stack:
            # No lock: a repository that takes no writes, or that a dead prune has locked, must still be restorable.
            # A prune that runs meanwhile removes only what no snapshot uses; at worst the dump fails, loudly.
            child = repository.start(["--no-lock", "dump", snapshot, f"/{name}"])
            self._child = stack.enter_context(child)
            if ctx is not None:
                stack.enter_context(ctx.on_cancel(child.stop))
                ctx.stack.callback(self.close)
            self._stack = stack.pop_all()

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with the next bytes and return how many; 0 at the end."""
        if self._ended:
            return 0
        count = self._child.output.readinto(buffer) or 0
        self._count += count
        if self._count > self._size:
            raise IntegrityError(f"{self._what}: more than its {self._size} bytes came")
        if count == 0 or self._count == self._size:
            self._end()
        return count

    def _end(self) -> None:
        if self._child.output.read(1):
            raise IntegrityError(f"{self._what}: more than its {self._size} bytes came")
        code = self._child.wait()
        if self._ctx is not None:
            self._ctx.check()
        if code:
            raise self._repository.failed(self._child, code, self._what)
        if self._count != self._size:
            raise IntegrityError(f"{self._what}: only {self._count} of its {self._size} bytes came")
        self._ended = True

    def close(self) -> None:
        """End restic if it still runs."""
        if not self.closed:
            super().close()
            if hasattr(self, "_stack"):  # absent if restic could not be started
                self._stack.close()
