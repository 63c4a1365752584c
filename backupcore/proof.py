"""The proof of a flatten: what its datastore holds is what was sent there. Without it nothing old is deleted."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from blake3 import blake3

from backupcore import manifest as manifests
from backupcore.errors import BackupError, IntegrityError
from backupcore.model import Artifact, SourceRef
from backupcore.opened import checked
from backupcore.verify import verify_disk

if TYPE_CHECKING:
    from backupcore.context import Context
    from backupcore.datastore import Datastore

__all__ = ["prove", "stored_manifest", "take_back"]

_LEAST, _LARGEST = 64, 4096  # clusters of a disk that are read back at least and at most, where it is a sample


def prove(datastore: Datastore, source: SourceRef, manifest: bytes, ctx: Context, *, sample: float) -> None:
    """IntegrityError unless `source` holds what `manifest` says: every size, every small artifact, all tables and sums,
    and of the data the share `sample` (1: all of it).
    """
    what = f"the new source {source}"
    artifacts = datastore.artifacts(source, ctx)
    if stored_manifest(artifacts, source) != manifest:
        raise IntegrityError(f"{what}: its manifest is not the one that was stored")
    parsed = manifests.parse(manifest, what)
    sizes = {part.artifact: part.size for part in parsed.disks} | {part.name: part.size for part in parsed.artifacts}
    found = {name: artifact.size for name, artifact in artifacts.items() if name != manifests.NAME}
    if found != sizes:
        wrong = sorted(name for name in found.keys() | sizes.keys() if found.get(name) != sizes.get(name))
        raise IntegrityError(f"{what}: missing, unknown, or of another size: {', '.join(wrong)}")
    sums = {part.sums for part in parsed.disks}
    for entry in parsed.artifacts:
        if entry.name not in sums:
            with artifacts[entry.name].open() as file:
                if blake3(file.read()).hexdigest() != entry.digest:
                    raise IntegrityError(f"{what}: {entry.name} is not what was stored")
    for part in parsed.disks:
        with checked(artifacts[part.sums], part.sums_digest, ctx.folder) as due:
            verify_disk(
                artifacts[part.artifact], part, due, ctx, what=what, sample=sample, least=_LEAST, largest=_LARGEST
            )


def take_back(datastore: Datastore, source: SourceRef, manifest: bytes, ctx: Context) -> None:
    """Delete a result that does not stand the proof: nobody knows of it, and all that it was made from is there.

    Only if it is ours by its manifest: a driver that is wrong may have answered with somebody else's source.
    """
    with contextlib.suppress(BackupError):
        if stored_manifest(datastore.artifacts(source, ctx), source) == manifest:
            datastore.delete([source], ctx)


def stored_manifest(artifacts: Mapping[str, Artifact], source: SourceRef) -> bytes:
    """The manifest among the artifacts of a source. IntegrityError if there is none, or one that is too large."""
    artifact = artifacts.get(manifests.NAME)
    if artifact is None or artifact.size > manifests.LIMIT:
        raise IntegrityError(f"source {source} has no manifest, or one larger than {manifests.LIMIT >> 20} MiB")
    with artifact.open() as file:
        return file.read()
