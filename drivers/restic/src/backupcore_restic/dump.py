"""What `restore` returns where nothing can be mounted: artifacts streamed from ``restic dump`` as they are opened."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, BinaryIO

from backupcore.child import ChildStream
from backupcore.errors import BackupError, TargetUnavailable
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
        self.snapshot = snapshot
        self._ctx = ctx

    @property
    def what(self) -> str:
        """What reading it is called in errors."""
        return f"reading {self.name} of snapshot {self.snapshot[:8]} in {Repository(self._options).name}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ctx": None}

    def open(self) -> BinaryIO:
        """The file from byte 0; a dump that fails, or is too short or too long, raises from the read that meets it."""
        repository = Repository(self._options)
        what = self.what
        # No lock: a repository that takes no writes, or that a dead prune has locked, must still be restorable.
        # A prune that runs meanwhile removes only what no snapshot uses; at worst the dump fails, loudly.
        child = repository.start(["--no-lock", "dump", self.snapshot, f"/{self.name}"])
        stream = ChildStream(
            child,
            self.size,
            what,
            lambda ended, code: repository.failed(ended, code, what),
            self._ctx,
            limit=self._options.timeout,
        )
        return io.BufferedReader(stream, 1 << 20)

    def reason(self, end: int) -> BackupError:
        """Why the bytes before `end` cannot be read otherwise, as restic says when they are read by this."""
        try:
            with self.open() as file:
                while end > 0:
                    end -= len(file.read(min(end, 1 << 20)))
        except BackupError as error:
            return error
        return TargetUnavailable(f"{self.what}: restic mount could not, restic dump could", "Try it again.")
