"""The manifest, format 1: what one backup holds, and what binds it to its VM and to its parent.

``manifest.json`` is the last artifact of a backup; a backup without it is not complete. It is JSON in UTF-8, at most
16 MiB. Digests are BLAKE3-256 in hex (64 digits); points and images 32 hex digits; sizes are bytes; the date is ISO
8601 in UTC. Unknown keys are ignored, so a later version may add some; a higher `format` is refused by name.

A link goes from an increment to its parent's point and to the digest of the parent's manifest, never to a source, a
number or a path of a host. So whoever holds the manifests can put the chain together and notice a link that is missing,
exchanged, out of order or another VM's.

Every artifact but the disks and the manifest itself stands in `artifacts` with its digest. A disk's digests are two:
`tables_digest` covers its qcow2 tables (everything before the first data cluster), `sums_digest` covers
``sums.<id>``, the BLAKE3 of each of its 64 KiB data clusters in file order.

A flattened full names the points that it `replaces`, the last of which is its own, and in `stands_for` the digest of
the manifest of the increment that had this point before: a child that was taken then holds it as its parent's. `began`
is the date of the image's first full. Where a store made it by copying on its own side, the `order` of a disk is
``file``: its data clusters lie as they were copied, those that were replaced among them, and the sums cover all.

`installation` is the ID of who took the backup, and stands where that has one; older versions wrote none. `host` is the
name of the machine, for people.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from msgspec import Meta, MsgspecError, Struct, json

from backupcore.disk.extents import CLUSTER
from backupcore.disk.table import DIGEST
from backupcore.draft import FORMAT, NAME, ManifestArtifact
from backupcore.errors import IntegrityError, UnsupportedOperation
from backupcore.model import Disk, Type

__all__ = ["FORMAT", "LIMIT", "NAME", "Manifest", "ManifestArtifact", "parse"]

LIMIT = 16 << 20

# \Z, since $ lets a newline pass at the end.
Hex32 = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
Hex64 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,126}\Z")]
DiskId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}\Z")]
Size = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class _AnyFormat(Struct, frozen=True, kw_only=True):
    format: object = None


class VMPart(Struct, frozen=True, kw_only=True):
    """Whose backup this is."""

    uuid: str
    name: str


class ParentPart(Struct, frozen=True, kw_only=True):
    """The link to the parent."""

    point: Hex32
    digest: Hex64


class DiskPart(Struct, frozen=True, kw_only=True):
    """One disk; `size` is that of its artifact, `order` how its data clusters lie in it (`backupcore.disk.stored`)."""

    id: DiskId
    artifact: Name
    virtual_size: Size
    size: Size
    whole: bool
    tables_digest: Hex64
    sums_digest: Hex64
    reason: str = ""
    order: Literal["guest", "file"] = "guest"

    @property
    def sums(self) -> str:
        """The name of the artifact with this disk's sums."""
        return f"sums.{self.id}"

    @property
    def disk(self) -> Disk:
        """The same as the model's value."""
        return Disk(
            id=self.id,
            artifact=self.artifact,
            virtual_size=self.virtual_size,
            whole=self.whole,
            reason=self.reason,
        )


class ArtifactPart(Struct, frozen=True, kw_only=True):
    """An artifact that is no disk."""

    name: Name
    size: Size
    digest: Hex64


class LeftOutPart(Struct, frozen=True, kw_only=True):
    """A disk, or another part of the VM (``tpm``, ``kernel``), that the backup does not hold, and why."""

    id: str
    reason: str


class Manifest(Struct, frozen=True, kw_only=True):
    """A manifest that has been checked. `parse` makes one."""

    format: Literal[1]
    image: Hex32
    vm: VMPart
    host: str
    installation: Hex32 | None = None
    point: Hex32
    parent: ParentPart | None
    number: Annotated[int, Meta(ge=0)]
    type: Type
    date: datetime
    reason: str
    consistency: Literal["crash", "filesystem", "paused", "off"]
    frozen_seconds: float
    versions: dict[str, str]
    disks: tuple[DiskPart, ...]
    left_out: tuple[LeftOutPart, ...] = ()
    artifacts: tuple[ArtifactPart, ...]
    replaces: tuple[Hex32, ...] = ()
    stands_for: Hex64 | None = None
    began: datetime | None = None

    def __post_init__(self) -> None:
        names = [part.artifact for part in self.disks] + [part.name for part in self.artifacts]
        if len(set(names)) != len(names) or NAME in names:
            raise ValueError("an artifact is named twice")
        if (self.parent is None) != (self.type is Type.FULL):
            raise ValueError("a full has no parent, an increment has one")
        digests = {part.name: part.digest for part in self.artifacts}
        sizes = {part.name: part.size for part in self.artifacts}
        for disk in self.disks:
            if disk.artifact != f"disk.{disk.id}.qcow2" or digests.get(disk.sums) != disk.sums_digest:
                raise ValueError(f"disk {disk.id} and its artifacts do not agree")
            # 0.05 % of the disk, whatever a store may claim: they are fetched before anything of it is believed.
            if sizes[disk.sums] % DIGEST or sizes[disk.sums] > -(-disk.size // CLUSTER) * DIGEST:
                raise ValueError(f"disk {disk.id} of {disk.size} bytes has sums of {sizes[disk.sums]} bytes")
            if self.type is Type.FULL and not disk.whole:
                raise ValueError(f"disk {disk.id} of a full is not whole")
            if disk.order == "file" and not disk.whole:
                raise ValueError(f"disk {disk.id} lies in the order of a full, and is not whole")


# Made here, by the one thread that imports this: msgspec 0.22 works out a type when it first decodes one, and where two
# threads do so at once, as of a listing's manifests, one of them reads what is not there yet: the process is killed.
_any_format = json.Decoder(_AnyFormat)
_manifest = json.Decoder(Manifest)


def parse(data: bytes, what: str) -> Manifest:
    """The manifest in `data`; `what` names it in errors.

    IntegrityError if it is none, UnsupportedOperation if its format is newer than this version knows.
    """
    if len(data) > LIMIT:
        raise IntegrityError(f"{what}: the manifest is larger than {LIMIT >> 20} MiB")
    try:
        number = _any_format.decode(data).format
        if isinstance(number, int) and number > FORMAT:
            raise UnsupportedOperation(
                f"{what}: the manifest has format {number}, this version knows {FORMAT}", "Use a newer version."
            )
        return _manifest.decode(data)
    except (MsgspecError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{what}: not a manifest: {error!s:.200}") from None
