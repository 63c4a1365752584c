"""The frozen values that cross the contract. Sizes and offsets are bytes, times are seconds, dates are aware UTC.

Identities: a *point* is the UUID of one instant of one VM, an *image* has a UUID; both are written as 32 hex digits. An
increment's *number* is its ID within the image: 0 for the full that starts it.
"""

from __future__ import annotations

import abc
import io
import re
import typing
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import BinaryIO, Protocol

from backupcore.errors import ContractViolation

__all__ = [
    "Artifact",
    "BackupRun",
    "BytesArtifact",
    "Consistency",
    "Copy",
    "Disk",
    "DiskEstimate",
    "Estimate",
    "Image",
    "Increment",
    "LeftOut",
    "Link",
    "Listed",
    "Literal",
    "Merge",
    "Outcome",
    "Prepared",
    "RunState",
    "SourceRef",
    "Stored",
    "Type",
    "Usage",
    "VM",
    "check_name",
    "is_token",
    "itself",
    "new_id",
    "stream",
]

Consistency = typing.Literal["crash", "filesystem", "paused", "off"]
"""What state a point is in: as after a power cut, with file systems frozen, with the VM paused, or powered off."""

_TOKEN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,127}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,126}")


def new_id() -> str:
    """A fresh identity for a point, an image or a run: 32 hex digits (a random UUID)."""
    return uuid.uuid4().hex


def is_token(text: object) -> bool:
    """Whether `text` is made like the token of a source, and so safe wherever one is."""
    return isinstance(text, str) and _TOKEN.fullmatch(text) is not None


class Type(StrEnum):
    """What one backup holds: every allocated block, or the blocks that changed since its parent."""

    FULL = "FULL"
    INCREMENT = "INCREMENT"

    @property
    def letter(self) -> str:
        """F or I, as the table of increments shows it."""
        return self.value[0]


@dataclass(frozen=True, slots=True)
class SourceRef:
    """The opaque reference that a driver returns for one stored backup. Only that driver reads it.

    The token matches ``[A-Za-z0-9][A-Za-z0-9._=-]{0,127}`` as a whole, so it is safe as a path segment, as an object
    key and within ``restic://nas/0:25f4b298``. Anything else is a ContractViolation, from either side.
    """

    token: str

    def __post_init__(self) -> None:
        if not is_token(self.token):
            raise ContractViolation(f"{self.token!r:.200} is no valid source token")

    def __str__(self) -> str:
        return self.token


@dataclass(frozen=True, slots=True)
class VM:
    """A libvirt domain: shown by name, bound by UUID (written with dashes, lower case)."""

    uuid: str
    name: str


class Artifact(abc.ABC):
    """One named byte string of a backup: a stream, not a file.

    `name` is a plain file name: ``disk.vda.qcow2``, ``vm.xml``. `size` is exact and known before a byte is read. An
    artifact can be pickled: it then carries addresses and tables, never an open connection, lock or client.

    All artifacts that a driver is given can be read at any offset, from any thread, as often as it likes. Those that a
    driver returns from `restore` need only `open`; where `read_at` works as well they say so by `seekable`.
    """

    name: str
    size: int
    seekable: bool = True

    @abc.abstractmethod
    def open(self) -> BinaryIO:
        """A new sequential stream from byte 0; may be called again, and closed early without harm."""

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`, or what is left of them before `size`."""
        raise ContractViolation(f"artifact {self.name} is not seekable")

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """`read_at` straight into `buffer`: how many bytes it got, fewer than it holds at the end only."""
        data = self.read_at(offset, len(buffer))
        if len(data) > len(buffer):
            raise ContractViolation(
                f"{self.name} gave {len(data)} of {len(buffer)} bytes at {offset} of {self.size}", "It must give fewer."
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:  # noqa: B027 - most artifacts hold nothing to let go of
        """Let go of connections. The giver calls it when the backup hook has returned; reads fail from then on."""


class ArtifactStream(io.RawIOBase):
    """The sequential stream of a seekable artifact."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__()
        self._artifact = artifact
        self._offset = 0

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # Buffer has no length
        """Fill `buffer` with the next bytes and return how many; 0 at the end."""
        count = self._artifact.read_into(self._offset, memoryview(buffer))
        self._offset += count
        return count

    def tell(self) -> int:
        """The offset of the next byte."""
        return self._offset


def stream(artifact: Artifact, buffer: int = 1 << 20) -> BinaryIO:
    """`open` for an artifact that has `read_at`: a buffered stream that reads `buffer` bytes at a time."""
    return io.BufferedReader(ArtifactStream(artifact), buffer)


def itself(artifact: Artifact) -> Artifact:
    """The artifact: what a wrapper of this process becomes in another, by ``__reduce__``."""
    return artifact


@dataclass(frozen=True)
class BytesArtifact(Artifact):
    """A small artifact that lies in memory: a VM's definition, its NVRAM."""

    name: str
    data: bytes = field(repr=False)
    seekable = True

    @property
    def size(self) -> int:  # type: ignore[override]  # read-only here: the data decide it
        """The length of the data."""
        return len(self.data)

    def open(self) -> BinaryIO:
        """The data from byte 0."""
        return io.BytesIO(self.data)

    def read_at(self, offset: int, length: int) -> bytes:
        """A slice of the data."""
        return self.data[offset : offset + length]


def check_name(name: str) -> str:
    """`name`, if it can stand as an artifact's name on every store; else ContractViolation."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ContractViolation(f"{name!r:.200} is no valid artifact name")
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """One disk within a backup.

    `id` is the target name in the VM (``vda``), `artifact` names the artifact with its blocks, `virtual_size` is what
    the guest sees. `whole` is true where the artifact does not build on the parent: in a full, or for a disk added
    since. `reason` says why a disk is whole within an increment, "" otherwise.

    The rest stays on the host, for the hypervisor, which must not take another disk's changes for this one's: `path` is
    where the disk lay; `tail` its last ranges that held data (offset, length); `marked` whether its image bears a mark
    of the point; `below` the files below it, in order, as they were (real path, inode, bytes, time of the last write in
    ns; 0 for what tells nothing), None where that is not known; `probes` what a few of its clusters held: the offset,
    and the digest (BLAKE3 in hex) of the 64 KiB there, or of what is left of the disk.
    """

    id: str
    artifact: str
    virtual_size: int
    whole: bool
    reason: str = ""
    path: str = ""
    tail: tuple[tuple[int, int], ...] = ()
    marked: bool = False
    below: tuple[tuple[str, int, int, int], ...] | None = None
    probes: tuple[tuple[int, str], ...] = ()

    def __post_init__(self) -> None:
        # JSON has no tuples, and the catalog keeps it as JSON.
        object.__setattr__(self, "tail", tuple((offset, length) for offset, length in self.tail))
        object.__setattr__(self, "probes", tuple((offset, digest) for offset, digest in self.probes))
        if self.below is not None:
            object.__setattr__(self, "below", tuple((path, *rest) for path, *rest in self.below))


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A disk, or another part of the VM (``tpm``, ``kernel``), that the backup does not hold, and why.

    `missed` is what ought to be in it, data of the guest for instance, and nobody chose to leave out: somebody has to
    see to it, so the backup ends with a warning.
    """

    id: str
    reason: str
    missed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What binds an increment to its parent: the parent's point, the digest of its manifest (64 hex), its disks."""

    point: str
    digest: str
    disks: tuple[Disk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupRun:
    """One backup of one VM, as the hooks see it.

    `parent` is None for a full. `reason` says why a full was taken (or "" for an increment). `builds_on` are the
    sources of the image so far, oldest first. `spent` are the points whose checkpoints may go once this run is
    recorded: those of this chain that are older than the parent. `keep` are the points that next increments may build
    on, of this VM's chains in all datastores; checkpoints of any other point, made by us, are strays and may go. None
    says nothing of them. `settings` is the VM's backup configuration (upper-case keys). `date`, the instant, is set
    once `prebackup` has told it, so the driver sees it and the hypervisor does not.

    `installation` says who takes it: 32 hex digits that the tooling's state folder has for good, "" where there are
    none. Whoever decides what is one's own (an unfinished upload, a checkpoint) goes by that, never by `host`, the name
    of the machine, which is for people: it may change, and another may have the same.
    """

    id: str
    vm: VM
    host: str
    datastore: str
    image: str
    number: int
    point: str
    type: Type
    parent: Link | None = None
    reason: str = ""
    builds_on: tuple[SourceRef, ...] = ()
    spent: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    tracked: bool = True
    date: datetime | None = None
    keep: tuple[str, ...] | None = None
    installation: str = ""

    @property
    def labels(self) -> dict[str, str]:
        """Short ASCII labels that a driver stores beside a source and returns from `sources`.

        ``vm``, ``image``, ``number``, ``point``, ``parent`` ("" for a full), ``type``, ``date`` (ISO 8601, UTC), and
        ``installation`` where the run has one. Later versions may add some.
        """
        owner = {"installation": self.installation} if self.installation else {}
        return {
            "vm": self.vm.uuid,
            "image": self.image,
            "number": str(self.number),
            "point": self.point,
            "parent": self.parent.point if self.parent else "",
            "type": self.type.value,
            "date": self.date.strftime("%Y-%m-%dT%H:%M:%SZ") if self.date else "",
            **owner,
        }

    def as_full(self, reason: str) -> BackupRun:
        """The same run as a full in a new image, for this reason; the old chain's checkpoints are then spent.

        The point stays: nothing was made under its name, since the guest was not touched yet, and whoever cleans up
        after a run that was killed knows that name.
        """
        spent = self.spent + ((self.parent.point,) if self.parent else ())
        return replace(
            self,
            image=new_id(),
            number=0,
            type=Type.FULL,
            parent=None,
            reason=reason,
            builds_on=(),
            spent=spent,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What the hypervisor hands over: artifacts that show one instant of the VM.

    `date` is that instant. `disks` names the artifacts that are disks; every one is a
    `backupcore.disk.qcow2.DiskArtifact`. `frozen_seconds` is how long the guest stood still. `left_out` names what
    the backup does not hold. `versions` are those of the programs that took part.
    """

    artifacts: tuple[Artifact, ...]
    date: datetime
    consistency: Consistency
    frozen_seconds: float
    disks: tuple[Disk, ...]
    left_out: tuple[LeftOut, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A driver's answer to `backup` and `flatten`: the new source, and how many bytes it added (None if not known)."""

    source: SourceRef
    stored: int | None = None


class RunState(StrEnum):
    """How a run ended."""

    RECORDED = "recorded"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How the run ended, what was stored (None if nothing), and the error (None if recorded)."""

    state: RunState
    stored: Stored | None = None
    error: BaseException | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One complete source as a driver lists it: its labels as `run.labels` gave them, its size where that is cheap."""

    source: SourceRef
    labels: Mapping[str, str]
    size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Bytes used, in total and free in a datastore; None where the store does not say."""

    used: int | None = None
    total: int | None = None
    free: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Increment:
    """One row of an image. `pid` is the parent's ID, -1 for a full; `digest` that of its manifest (64 hex)."""

    id: int
    pid: int
    type: Type
    point: str
    source: SourceRef
    size: int
    date: datetime
    consistency: Consistency
    reason: str
    digest: str
    disks: tuple[Disk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """The chain of increments of one VM in one datastore, oldest first. `number` is its alias on this host.

    One that is ``absent`` lies in another place than the one that its datastore is now. `why_closed` says why no
    increment is added to it any more, "" where no reason was given. `host` is where its last backup was taken ("" where
    that is not known), `installation` whose it is ("" in backups of versions that did not write it down); `began` the
    date of its first full, which a flatten may have replaced (None: that of the oldest increment).
    """

    uuid: str
    number: int
    vm: VM
    datastore: str
    state: typing.Literal["open", "closed", "flattening", "damaged", "absent"]
    increments: tuple[Increment, ...]
    pinned: bool = False
    why_closed: str = ""
    host: str = ""
    began: datetime | None = None
    installation: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskEstimate:
    """What a backup would take from one disk: bytes, or None where that is not known before the backup.

    `reason` says why a disk is whole within an increment, "" otherwise.
    """

    id: str
    bytes: int | None
    whole: bool
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a backup would do, found out without touching the guest."""

    disks: tuple[DiskEstimate, ...]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A run of bytes that a store can copy on its own side, out of an artifact of a source that is being merged."""

    source: SourceRef
    artifact: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Literal:
    """A run of bytes that must be sent."""

    data: bytes


class Merge(Protocol):
    """The result of a flatten: lazy, and finished as if a full had been taken."""

    @property
    def sources(self) -> Sequence[SourceRef]:
        """Exactly those to merge, oldest first."""

    @property
    def artifacts(self) -> Sequence[Artifact]:
        """The finished result."""

    def pieces(self, artifact: Artifact) -> Iterable[Copy | Literal]:
        """The bytes of one artifact in order, for stores that copy on their own side."""
