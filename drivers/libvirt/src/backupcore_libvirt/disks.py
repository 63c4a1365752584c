"""The disks of a VM: out of its definition, and as QEMU has them open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from backupcore.errors import HypervisorError
from backupcore_libvirt.connection import Domain
from backupcore_libvirt.source import Source, source_of
from backupcore_libvirt.xml import parse

__all__ = [
    "BY_RULE",
    "Bitmap",
    "DiskChoice",
    "Node",
    "SourceDisk",
    "away_at_the_start",
    "located",
    "nodes",
    "source_disks",
]


@dataclass(frozen=True, slots=True)
class DiskChoice:
    """What a VM's settings say about its disks.

    Those that no backup holds, those whose contents need not last (`volatile`), whether these are kept all the same,
    and whether encrypted ones may be kept in plain text.
    """

    excluded: frozenset[str] = frozenset()
    volatile: frozenset[str] = frozenset()
    keep_volatile: bool = False
    plain_text: bool = False

    @classmethod
    def of(cls, settings: Mapping[str, str]) -> DiskChoice:
        """Out of EXCLUDE_DISKS, VOLATILE_DISKS, BACKUP_VOLATILE, ENCRYPTED_DISKS."""
        return cls(
            excluded=frozenset(filter(None, settings.get("EXCLUDE_DISKS", "").split(","))),
            volatile=frozenset(filter(None, settings.get("VOLATILE_DISKS", "").split(","))),
            keep_volatile=settings.get("BACKUP_VOLATILE", "NO") == "YES",
            plain_text=settings.get("ENCRYPTED_DISKS", "REFUSE") == "PLAIN",
        )


_KINDS = ("file", "block", "volume")

BY_RULE = DiskChoice()
"""No settings: what is left out is left out by rule."""


@dataclass(frozen=True, slots=True)
class SourceDisk:
    """One disk out of a domain's XML.

    `id` is its target name, `kind` libvirt's disk type (file, block, volume, network …), `path` the file or device
    (POOL/VOLUME for a volume, see `located`; "" where it has none), `index` libvirt's number of the source while the VM
    runs ("" otherwise). `source` is what the definition says of that file besides. `left_out` says why a backup does
    not hold it, or ""; `missed` is whether that is for want of a way, and nobody's choice.
    """

    id: str
    kind: str
    path: str
    format: str
    index: str
    error_policy: str
    encrypted: bool
    left_out: str
    source: Source
    missed: bool


def source_disks(xml: str, choice: DiskChoice = BY_RULE) -> tuple[SourceDisk, ...]:
    """Every disk of the domain definition `xml`, in its order, also those that a backup leaves out."""
    found = []
    for disk in parse(xml).iterfind("./devices/disk"):
        target = disk.find("target")
        source = disk.find("source")
        driver = disk.find("driver")
        place = dict(source.attrib) if source is not None else {}
        options = dict(driver.attrib) if driver is not None else {}
        kind = disk.get("type", "")
        path = place.get("file") or place.get("dev") or "/".join(filter(None, (place.get("pool"), place.get("volume"))))
        shape = options.get("type", "raw")
        name = target.get("dev", "") if target is not None else ""
        by_rule = _left_out(disk, kind, place)
        missed = "" if by_rule else _missed(disk, kind, shape, place)
        not_chosen = _not_chosen(disk, name, choice, running="index" in place)
        found.append(
            SourceDisk(
                id=name,
                kind=kind,
                path=path,
                format=shape,
                index=place.get("index", ""),
                error_policy=options.get("error_policy", ""),
                encrypted=disk.find(".//encryption") is not None,
                left_out=by_rule or (not_chosen if name in choice.excluded else missed or not_chosen),
                source=source_of(disk),
                missed=bool(missed) and name not in choice.excluded,
            )
        )
    return tuple(found)


def away_at_the_start(live_xml: str, stored_xml: str) -> tuple[SourceDisk, ...]:
    """Disks that a running VM lacks since their files were away when it started, as the stored definition has them.

    libvirt takes them out of the running definition without a word (``startupPolicy``).
    """
    here = {disk.id for disk in source_disks(live_xml)}
    optional = {
        str(target.get("dev"))
        for disk in parse(stored_xml).iterfind("./devices/disk")
        if (source := disk.find("source")) is not None
        and source.get("startupPolicy", "mandatory") != "mandatory"
        and disk.get("device", "disk") == "disk"
        and (target := disk.find("target")) is not None
    }
    return tuple(
        replace(disk, left_out="its file was away when the VM was started (startupPolicy)", missed=True)
        for disk in source_disks(stored_xml)
        if disk.id in optional - here and not disk.left_out
    )


def _left_out(disk: Any, kind: str, place: Mapping[str, str]) -> str:
    """Why a disk has nothing that a backup should hold, or ""."""
    device = disk.get("device", "disk")
    if device in ("cdrom", "floppy"):
        return {"cdrom": "a CD-ROM", "floppy": "a floppy"}[str(device)]
    if not place:
        return "empty"
    if disk.find("readonly") is not None and kind in _KINDS:
        return "read-only"
    return ""


def _missed(disk: Any, kind: str, shape: str, place: Mapping[str, str]) -> str:
    """Why a disk with data of the guest cannot be held, or "". Whoever knows it says EXCLUDE_DISKS."""
    device = disk.get("device", "disk")
    if device != "disk":
        return f"a SCSI device passed through ({device})"
    if disk.find("shareable") is not None:
        return "shareable: others write to it as well, so no instant of it can be held"
    if kind not in _KINDS:
        protocol = place.get("protocol", "")
        return f"a {kind} disk{f' ({protocol})' if protocol else ''}; file and block disks are supported"
    if disk.find("./source/reservations") is not None:
        return "a device with SCSI reservations: other hosts write to it as well, so no instant of it can be held"
    if shape not in ("qcow2", "raw"):
        return f"format {shape}; qcow2 and raw are supported"
    return ""


def _not_chosen(disk: Any, name: str, choice: DiskChoice, *, running: bool) -> str:
    if name in choice.excluded:
        return "excluded (EXCLUDE_DISKS)"
    if disk.find("transient") is not None:
        if not choice.keep_volatile:
            return "transient: what the guest writes to it is thrown away at power-off (BACKUP_VOLATILE=NO)"
        if running:
            return "transient: libvirt makes no backup of such a disk while the VM runs"
    if name in choice.volatile and not choice.keep_volatile:
        return "volatile (VOLATILE_DISKS, BACKUP_VOLATILE=NO)"
    return ""


def located(domain: Domain, disk: SourceDisk) -> SourceDisk:
    """The disk with the path of its file or device, for programs other than libvirt: a volume's pool knows it.

    Unchanged where it does not tell: while a VM runs its pool may be gone.
    """
    if disk.kind != "volume":
        return disk
    pool, _, volume = disk.path.partition("/")
    try:
        path, kind = domain.volume(pool, volume)
    except HypervisorError:
        return disk
    left_out = "a volume on the network; file and block disks are supported" if kind == "network" else ""
    return replace(disk, kind=kind, path=path, left_out=disk.left_out or left_out)


@dataclass(frozen=True, slots=True)
class Bitmap:
    """One dirty bitmap as QEMU has it. Only one that is `usable` tells what changed: `dirty` bytes, where known."""

    name: str
    recording: bool
    inconsistent: bool
    dirty: int | None = None

    @property
    def usable(self) -> bool:
        """Whether it recorded every write since it was made."""
        return self.recording and not self.inconsistent


@dataclass(frozen=True, slots=True)
class Node:
    """A disk's top image as QEMU has it open, as `name`. `compat` is "0.10" for qcow2 v2, "1.1" for v3, "" for raw."""

    name: str
    virtual_size: int
    compat: str
    bitmaps: tuple[Bitmap, ...]
    snapshots: tuple[str, ...]


def nodes(domain: Domain, disks: Sequence[SourceDisk]) -> dict[str, Node]:
    """What QEMU itself knows of these disks of a running VM, by disk ID."""
    # flat: without it each node repeats its whole backing chain.
    by_name = {node["node-name"]: node for node in domain.query("query-named-block-nodes", flat=True)}
    found = {}
    for disk in disks:
        # libvirt names a disk's nodes by its source's index; for raw disks newer ones (11.3) have no format node, and
        # of a part of a file the node of the storage is the whole file.
        names = (f"libvirt-{disk.index}-{layer}" for layer in ("format", "slice-sto", "storage"))
        node = next((by_name[name] for name in names if name in by_name), None)
        if node is None:
            raise HypervisorError(
                f"VM {domain.name}: disk {disk.id} is not found among QEMU's block nodes",
                "Was the disk changed outside of libvirt, by QEMU's monitor? Restart the VM.",
            )
        image: Mapping[str, Any] = node["image"]
        special: Mapping[str, Any] = image.get("format-specific", {}).get("data", {})
        found[disk.id] = Node(
            name=str(node["node-name"]),
            virtual_size=int(image["virtual-size"]),
            compat=str(special.get("compat", "")) if disk.format == "qcow2" else "",
            bitmaps=tuple(
                Bitmap(
                    str(bitmap.get("name", "")),
                    bool(bitmap["recording"]),
                    bool(bitmap.get("inconsistent", False)),
                    int(bitmap["count"]),
                )
                for bitmap in node.get("dirty-bitmaps", ())
            ),
            snapshots=tuple(str(snapshot["name"]) for snapshot in image.get("snapshots", ())),
        )
    return found
