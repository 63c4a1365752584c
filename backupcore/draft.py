"""The manifest of a backup that is being taken; `backupcore.manifest` says what stands in one, and reads it.

A module of its own, since the process of a file view needs it, and nothing that reads a manifest.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any, BinaryIO, Protocol

from backupcore.model import Artifact

__all__ = ["FORMAT", "NAME", "ManifestArtifact"]

FORMAT = 1
NAME = "manifest.json"


class Sums(Protocol):
    """What is needed of a sums artifact; `backupcore.disk.sums.SumsArtifact` is one."""

    name: str
    size: int

    def digest(self) -> bytes:
        """BLAKE3 over all of it; may wait until it is known."""


class ManifestArtifact(Artifact):
    """``manifest.json`` of a backup that is being taken.

    Its size is known at once, since a digest has as many digits before it is known as after. A read needs the
    digest of each sums artifact, and so waits until its disk was read (`backupcore.disk.sums`).
    """

    name = NAME

    def __init__(self, draft: dict[str, Any], sums: Mapping[str, Sums]) -> None:
        """`draft` is the manifest without digests of sums; `sums` maps a disk's ID to its sums artifact."""
        self._draft = draft
        self._sums = sums
        self.size = len(self._render(dict.fromkeys(sums, "0" * 64)))
        self._data: bytes | None = None

    def _render(self, digests: dict[str, str]) -> bytes:
        disks = [{**part, "sums_digest": digests[part["id"]]} for part in self._draft["disks"]]
        listed = [
            {"name": artifact.name, "size": artifact.size, "digest": digests[disk]}
            for disk, artifact in self._sums.items()
        ]
        whole = {**self._draft, "disks": disks, "artifacts": [*self._draft["artifacts"], *listed]}
        return json.dumps(whole, indent=1).encode() + b"\n"

    def data(self) -> bytes:
        """The finished manifest."""
        if self._data is None:
            self._data = self._render({disk: sums.digest().hex() for disk, sums in self._sums.items()})
        return self._data

    def open(self) -> BinaryIO:
        """The finished manifest from byte 0."""
        return io.BytesIO(self.data())

    def read_at(self, offset: int, length: int) -> bytes:
        """A slice of the finished manifest."""
        return self.data()[offset : offset + length]
