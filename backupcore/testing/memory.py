"""A driver that keeps backups in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import backupcore
from backupcore import hookimpl
from backupcore.context import Context
from backupcore.errors import IncrementImpossible, SourceNotFound
from backupcore.manifest import NAME
from backupcore.model import (
    Artifact,
    BackupRun,
    BytesArtifact,
    Copy,
    Listed,
    Literal,
    Merge,
    Prepared,
    SourceRef,
    Stored,
    Usage,
    new_id,
)

__all__ = ["CopyingMemoryDriver", "MemoryDriver"]


@backupcore.driver
class MemoryDriver:
    """Keeps every artifact as bytes.

    `kept` maps a token to its labels and artifacts, for tests to look at and to damage.
    """

    kept: dict[str, tuple[dict[str, str], dict[str, bytes]]] = backupcore.option("what is kept", default_factory=dict)

    @hookimpl
    def prebackup(self, run: BackupRun) -> Prepared | None:
        """The sources that this run builds on must be there."""
        for source in run.builds_on:
            if source.token not in self.kept:
                raise IncrementImpossible(f"source {source} is no longer in the datastore")
        return None

    @hookimpl
    def backup(self, artifacts: Sequence[Artifact], run: BackupRun, ctx: Context) -> Stored:
        """Read everything, then publish it with one assignment."""
        read: dict[str, bytes] = {}
        for artifact in artifacts:
            ctx.check()
            with artifact.open() as file:
                read[artifact.name] = file.read()
        token = new_id()
        self.kept[token] = (run.labels, read)
        return Stored(source=SourceRef(token), stored=sum(map(len, read.values())))

    @hookimpl
    def restore(self, source: SourceRef) -> Sequence[Artifact]:
        """The bytes that were kept."""
        if source.token not in self.kept:
            raise SourceNotFound(f"no source {source}")
        return [BytesArtifact(name, data) for name, data in self.kept[source.token][1].items()]

    @hookimpl
    def delete(self, sources: Sequence[SourceRef]) -> bool:
        """Forget them."""
        for source in sources:
            self.kept.pop(source.token, None)
        return True

    @hookimpl
    def sources(self) -> Iterable[Listed]:
        """Those with a manifest."""
        for token, (labels, files) in list(self.kept.items()):
            if NAME in files:
                yield Listed(source=SourceRef(token), labels=labels, size=sum(map(len, files.values())))

    @hookimpl
    def check(self) -> bool:
        """Memory is always there."""
        return True

    @hookimpl
    def usage(self) -> Usage:
        """The bytes that are kept."""
        return Usage(used=sum(len(data) for _, files in self.kept.values() for data in files.values()))


@backupcore.driver
class CopyingMemoryDriver(MemoryDriver):
    """One that flattens on its own side: bytes that it has are copied there, and not read through the core."""

    @hookimpl
    def flatten(self, merge: Merge, run: BackupRun, ctx: Context) -> Stored | None:
        """Follow the pieces of every artifact."""
        made: dict[str, bytes] = {}
        for artifact in merge.artifacts:
            ctx.check()
            made[artifact.name] = b"".join(map(self._piece, merge.pieces(artifact)))
        token = new_id()
        self.kept[token] = (run.labels, made)
        return Stored(source=SourceRef(token), stored=None)

    def _piece(self, piece: Copy | Literal) -> bytes:
        if isinstance(piece, Literal):
            return piece.data
        return self.kept[piece.source.token][1][piece.artifact][piece.offset : piece.offset + piece.length]
