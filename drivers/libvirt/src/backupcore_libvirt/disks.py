"""The disks of a VM: out of its definition, and as QEMU has them open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backupcore.errors import HypervisorError
from backupcore_libvirt.connection import Domain
from backupcore_libvirt.xml import parse

__all__ = ["Bitmap", "Node", "SourceDisk", "nodes", "source_disks"]


@dataclass(frozen=True, slots=True)
class SourceDisk:
    """One disk out of a domain's XML.

    `id` is its target name, `kind` libvirt's disk type (file, block, volume, network …), `path` the file or device
    ("" where it has none), `index` libvirt's number of the source while the VM runs ("" otherwise). `left_out` says why
    a backup does not hold it, or "".
    """

    id: str
    kind: str
    path: str
    format: str
    index: str
    error_policy: str
    encrypted: bool
    left_out: str


def source_disks(xml: str) -> tuple[SourceDisk, ...]:
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
        found.append(
            SourceDisk(
                id=target.get("dev", "") if target is not None else "",
                kind=kind,
                path=path,
                format=shape,
                index=place.get("index", ""),
                error_policy=options.get("error_policy", ""),
                encrypted=disk.find(".//encryption") is not None,
                left_out=_left_out(disk, kind, shape, place),
            )
        )
    return tuple(found)


def _left_out(disk: Any, kind: str, shape: str, place: Mapping[str, str]) -> str:  # noqa: PLR0911 - one return a rule
    device = disk.get("device", "disk")
    if device in ("cdrom", "floppy"):
        return {"cdrom": "a CD-ROM", "floppy": "a floppy"}[str(device)]
    if device != "disk":
        return f"a SCSI device passed through ({device})"
    if not place:
        return "empty"
    if disk.find("readonly") is not None:
        return "read-only"
    if disk.find("shareable") is not None:
        return "shareable: others write to it as well, so no instant of it can be held"
    if disk.find("transient") is not None:
        return "transient: what the guest writes to it is thrown away at power-off"
    if kind not in ("file", "block", "volume"):
        protocol = place.get("protocol", "")
        return f"a {kind} disk{f' ({protocol})' if protocol else ''}; file and block disks are supported"
    if shape not in ("qcow2", "raw"):
        return f"format {shape}; qcow2 and raw are supported"
    return ""


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
        # libvirt names a disk's nodes by its source's index; for raw disks newer ones have no format node.
        node = by_name.get(f"libvirt-{disk.index}-format") or by_name.get(f"libvirt-{disk.index}-storage")
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
