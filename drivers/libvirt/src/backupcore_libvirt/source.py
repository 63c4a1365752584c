"""What a disk's ``<source>`` says beyond the file: a part of it, another file for the data, what lies below.

libvirt gives all of that to the QEMU of a running VM. Whoever reads or replaces the file while the VM is off has to
know it as well: what is not known here is not read.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from backupcore_libvirt.xml import Element

__all__ = ["PLAIN", "Part", "Source", "source_of"]

_ATTRIBUTES = {"file", "dev", "pool", "volume", "mode", "startupPolicy", "index"}
_HARMLESS = {"seclabel", "privateData", "encryption"}
"""Encryption is looked at by itself."""
_DRIVER = {
    *("name", "type"),
    # How the guest's requests come and go; what is in the image they do not change.
    *("cache", "io", "ioeventfd", "event_idx", "iothread", "queues", "queue_size", "iommu", "ats", "packed"),
    *("page_per_vq", "error_policy", "rerror_policy", "copy_on_read", "discard", "detect_zeroes", "discard_no_unref"),
}
_DRIVER_CHILDREN = {"metadata_cache", "iothreads", "statistics"}
_TARGET = {"dev", "bus", "tray", "removable", "rotation_rate", "dpofua"}


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a file that a disk is: `size` bytes from `offset`."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Source:
    """What a definition says of a disk's file. Nothing, for most.

    `part` is what of the file the disk is, None for all of it. `data_file` is the file in which a qcow2 image keeps its
    data, where the definition names it. `below` are the files that the definition puts below the image, whatever its
    header says, "" for a volume of a pool; with `ends` there are no others. `unknown` is what else there is, of the
    driver and the target as well. `optional` is whether the VM starts without the file.
    """

    part: Part | None = None
    data_file: str = ""
    below: tuple[str, ...] = ()
    ends: bool = False
    unknown: tuple[str, ...] = ()
    optional: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the disk is its file, all of it, and nothing else."""
        return self.part is None and not self.data_file and not self.unknown

    def contradicts(self, below: Sequence[str]) -> bool:
        """Whether the definition puts other files below the image than these, which its header leads to."""
        if self.ends and len(below) != len(self.below):
            return True
        if len(self.below) > len(below):
            return True
        pairs = zip(self.below, below, strict=False)
        return any(told and os.path.realpath(told) != os.path.realpath(path) for told, path in pairs)


PLAIN = Source()


def source_of(disk: Element) -> Source:
    """What the ``<source>``, the ``<backingStore>``, the ``<driver>`` and the ``<target>`` of a ``<disk>`` say."""
    source = disk.find("source")
    if source is None:
        return PLAIN
    unknown = [
        *_strange(disk.find("driver"), _DRIVER, _DRIVER_CHILDREN),
        *_strange(disk.find("target"), _TARGET, set()),
    ]
    unknown += [f"@{name}" for name in source.attrib if name not in _ATTRIBUTES]
    part: Part | None = None
    data_file = ""
    for child in source:
        found = _part(child) if child.tag == "slices" else None
        if found is not None:
            part = found
        elif child.tag == "dataStore" and (name := _data_file(child)):
            data_file = name
        elif child.tag not in _HARMLESS:
            unknown.append(str(child.tag))
    below, ends, strange = _below(disk)
    optional = source.get("startupPolicy") == "optional"
    return Source(part, data_file, below, ends, (*unknown, *strange), optional)


def _strange(element: Element | None, attributes: Collection[str], children: Collection[str]) -> list[str]:
    """What of an element is not listed; of a driver also a name other than QEMU's."""
    if element is None:
        return []
    found = [f"{element.tag}/@{name}" for name in element.attrib if name not in attributes]
    found += [f"{element.tag}/{child.tag}" for child in element if child.tag not in children]
    if element.get("name", "qemu") != "qemu":
        found.append(f"{element.tag}/@name={element.get('name')}")
    return found


def _part(slices: Element) -> Part | None:
    """None where it is not one slice of known kind."""
    kinds = [str(child.tag) for child in slices]
    one = slices.find("slice")
    if kinds != ["slice"] or one is None or one.get("type") != "storage":
        return None
    try:
        return Part(int(one.get("offset", "0")), int(one.get("size", "")))
    except ValueError:
        return None


def _data_file(store: Element) -> str:
    """The path; "" where it is no plain raw file or device."""
    kind, source = store.findtext("format", ""), store.find("source")
    shape = store.find("format")
    if source is None or kind.strip() or (shape is not None and shape.get("type") != "raw"):
        return ""
    if set(source.attrib) - {"file", "dev", "index"} or any(child.tag not in _HARMLESS for child in source):
        return ""
    return source.get("file") or source.get("dev") or ""


def _below(disk: Element) -> tuple[tuple[str, ...], bool, tuple[str, ...]]:
    """The files that the definition puts below, whether they are all, and what of that is not known."""
    files: list[str] = []
    store = disk.find("backingStore")
    while store is not None:
        source = store.find("source")
        if source is None:
            return tuple(files), True, ()
        path = source.get("file") or source.get("dev") or ("" if source.get("pool") else None)
        strange = [f"backingStore/{name}" for name in source.attrib if name not in _ATTRIBUTES]
        strange += [f"backingStore/{child.tag}" for child in source if child.tag not in _HARMLESS]
        if strange or path is None:
            return tuple(files), False, tuple(strange) or ("backingStore",)
        files.append(path)
        store = store.find("backingStore")
    return tuple(files), False, ()
