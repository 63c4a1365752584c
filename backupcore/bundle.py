"""What a driver is given: the prepared artifacts, with sums and the manifest added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from backupcore.disk.qcow2 import DiskArtifact
from backupcore.disk.sums import HashedDisk, SumsArtifact
from backupcore.draft import FORMAT, NAME, ManifestArtifact
from backupcore.errors import ContractViolation
from backupcore.model import Artifact, BytesArtifact, check_name

if TYPE_CHECKING:
    from backupcore.context import Context
    from backupcore.disk.reader.remote import RemoteDisk
    from backupcore.model import BackupRun, Prepared

__all__ = ["Bundle", "draft"]

_NOTHING: Mapping[str, Any] = MappingProxyType({})

SMALL = 128 << 20
"""Artifacts that are no disks are held in memory, so they must stay small: definitions and firmware are under 1 MiB."""


class Bundle:
    """The artifacts of one run, ready for a driver.

    Every disk is wrapped so that its clusters are hashed as they pass, in its `reader` if it has one, and gets a
    ``sums.<id>`` beside it; everything else is read into memory. `artifacts` is in the order of their names, with the
    manifest among them.
    """

    def __init__(
        self, prepared: Prepared, run: BackupRun, ctx: Context, *, merged: Mapping[str, Any] = _NOTHING
    ) -> None:
        """ContractViolation if `prepared` names an artifact twice, a disk that is none, or one without its parent.

        `merged` are further entries of the manifest, for a flattened full.
        """
        by_name = {check_name(artifact.name): artifact for artifact in prepared.artifacts}
        if len(by_name) != len(prepared.artifacts) or NAME in by_name:
            raise ContractViolation("prebackup named an artifact twice")
        before = {disk.id for disk in run.parent.disks} if run.parent else set()
        self.disks: dict[str, HashedDisk | RemoteDisk] = {}
        self._sums: dict[str, SumsArtifact] = {}
        tables: dict[str, bytes] = {}
        for disk in prepared.disks:
            artifact = by_name.pop(disk.artifact, None)
            if not isinstance(artifact, DiskArtifact) or disk.artifact != f"disk.{disk.id}.qcow2":
                raise ContractViolation(f"prebackup names disk {disk.id}, but {disk.artifact} is no such artifact")
            if not disk.whole and disk.id not in before:
                raise ContractViolation(
                    f"prebackup gave what changed of disk {disk.id}, which the parent does not hold"
                )
            hashed = HashedDisk(artifact, ctx.folder / f"{run.image}.sums.{disk.id}")
            shown = hashed if artifact.reader is None else artifact.reader.show(hashed)
            self.disks[disk.id] = shown
            tables[disk.id] = artifact.layout.tables_digest()
            self._sums[disk.id] = SumsArtifact(f"sums.{disk.id}", shown)
        small = [_in_memory(artifact) for artifact in by_name.values()]
        sizes = {name: disk.size for name, disk in self.disks.items()}
        self.manifest = ManifestArtifact({**draft(prepared, run, small, sizes, tables), **merged}, self._sums)
        everything = [*self.disks.values(), *self._sums.values(), *small, self.manifest]
        self.artifacts: tuple[Artifact, ...] = tuple(sorted(everything, key=lambda artifact: artifact.name))

    @property
    def size(self) -> int:
        """Bytes of all artifacts together."""
        return sum(artifact.size for artifact in self.artifacts)

    @property
    def bytes_read(self) -> int:
        """Bytes read from the VM's disks so far, in whichever process."""
        return sum(disk.bytes_read for disk in self.disks.values())

    def check_complete(self) -> None:
        """ContractViolation unless every cluster was read: a driver that skips some has stored something else."""
        for disk in self.disks.values():
            if not disk.table.complete():
                raise ContractViolation(f"the driver reported a backup, but has not read all of {disk.name}")

    def close(self) -> None:
        """Close every connection to the VM's disks, for good: the hypervisor ends its job next."""
        for disk in self.disks.values():
            disk.close()


def draft(
    prepared: Prepared,
    run: BackupRun,
    small: Sequence[BytesArtifact],
    sizes: Mapping[str, int],
    tables: Mapping[str, bytes],
) -> dict[str, Any]:
    """The manifest without digests of sums. `sizes` and `tables` (their digests) are of the disks, by ID."""
    return {
        "format": FORMAT,
        "image": run.image,
        "vm": {"uuid": run.vm.uuid, "name": run.vm.name},
        "host": run.host,
        **({"installation": run.installation} if run.installation else {}),
        "point": run.point,
        "parent": {"point": run.parent.point, "digest": run.parent.digest} if run.parent else None,
        "number": run.number,
        "type": run.type.value,
        "date": prepared.date.astimezone(UTC).isoformat(timespec="milliseconds"),
        "reason": run.reason,
        "consistency": prepared.consistency,
        "frozen_seconds": round(prepared.frozen_seconds, 3),
        "versions": dict(prepared.versions),
        "disks": [
            {
                "id": disk.id,
                "artifact": disk.artifact,
                "virtual_size": disk.virtual_size,
                "size": sizes[disk.id],
                "whole": disk.whole,
                "tables_digest": tables[disk.id].hex(),
                "reason": disk.reason,
            }
            for disk in prepared.disks
        ],
        "left_out": [{"id": left.id, "reason": left.reason} for left in prepared.left_out],
        "artifacts": [
            {"name": artifact.name, "size": artifact.size, "digest": blake3(artifact.data).hexdigest()}
            for artifact in small
        ],
    }


def _in_memory(artifact: Artifact) -> BytesArtifact:
    if artifact.size > SMALL:
        raise ContractViolation(f"artifact {artifact.name} has {artifact.size} bytes; only disks may exceed {SMALL}")
    with artifact.open() as file:
        data = file.read(SMALL + 1)
    if len(data) != artifact.size:
        raise ContractViolation(f"artifact {artifact.name} promised {artifact.size} bytes and has {len(data)}")
    return BytesArtifact(artifact.name, data)
