"""What a qcow2 image says in its header, by itself: no program is run, so nothing is opened that it names.

The layout is docs/interop/qcow2.txt of QEMU.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from backupcore.disk.geometry import MAGIC
from backupcore_libvirt.backing import Backing, backing_of

__all__ = ["Header", "backing", "files_of", "full_name", "header_of"]

# Magic, version, backing name and its length, cluster bits, size, encryption; at 60 how many snapshots.
_START = struct.Struct(">4sIQIIQI24xI")
_FEATURES = struct.Struct(">QQQ")
_VERSION_2 = 72
_LONGEST = 1 << 16
_NAME = 1023
_LARGEST_CLUSTER = 2 << 20
_BACKING_FORMAT, _DATA_FILE = 0xE2792ACA, 0x44415441
_ENCRYPTIONS = {1: "AES", 2: "LUKS"}
_DIRTY, _CORRUPT, _DATA, _COMPRESSION, _SUBCLUSTERS = (1 << bit for bit in range(5))
_KNOWN = _DIRTY | _DATA | _COMPRESSION | _SUBCLUSTERS
_MOST = 200  # files of one chain: what libvirt takes


@dataclass(frozen=True, slots=True)
class Header:
    """A qcow2 header: the features that a reader must know, the encryption ("" for none), and the other files.

    `backing` and `data_file` are names as they are written, "" for none; `backing_shape` is None where it is not said.
    `snapshots` is how many the image holds (`qemu-img snapshot`), of which libvirt need not know.
    """

    features: int
    encryption: str
    backing: str
    backing_shape: str | None
    data_file: str
    snapshots: int = 0

    @property
    def damaged(self) -> bool:
        """Whether QEMU has marked it so: it then opens it for reading only."""
        return bool(self.features & _CORRUPT)

    @property
    def strange(self) -> str:
        """What speaks against reading the image without its own QEMU, or ""."""
        if self.encryption:
            return f"is encrypted by its own header ({self.encryption})"
        if self.damaged:
            return "is marked as damaged"
        if unknown := self.features & ~(_KNOWN | _CORRUPT):
            bits = ", ".join(str(bit) for bit in range(64) if unknown >> bit & 1)
            return f"has features that are not known here (incompatible feature bits {bits})"
        return ""


def header_of(path: str, offset: int = 0) -> Header | None:
    """The header of the image that begins at this byte of a file or device; None where there is no qcow2. OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        start = os.pread(handle, _LONGEST, offset)
        if len(start) < _VERSION_2 or not start.startswith(MAGIC):
            return None
        _, version, backing_at, length, _, _, encryption, snapshots = _START.unpack_from(start)
        # Beyond the largest cluster QEMU opens no such image, and says so.
        named = 0 < backing_at <= _LARGEST_CLUSTER
        name = os.pread(handle, min(length, _NAME), offset + backing_at) if named else b""
    finally:
        os.close(handle)
    features, end = 0, _VERSION_2
    if version >= 3 and len(start) >= 104:
        features = int(_FEATURES.unpack_from(start, _VERSION_2)[0])
        end = int.from_bytes(start[100:104], "big")
    more = dict(_extensions(start, end))
    shape = more.get(_BACKING_FORMAT)
    return Header(
        features=features,
        encryption=_ENCRYPTIONS.get(encryption, f"method {encryption}") if encryption else "",
        backing=_string(name),
        backing_shape=_string(shape) if shape is not None else None,
        data_file=_string(more.get(_DATA_FILE, b"")) if features & _DATA else "",
        snapshots=snapshots,
    )


def _string(written: bytes) -> str:
    """As QEMU takes it: up to the first NUL, which no path can hold."""
    return os.fsdecode(written.partition(b"\0")[0])


def _extensions(start: bytes, place: int) -> Iterator[tuple[int, bytes]]:
    while place + 8 <= len(start):
        kind, length = struct.unpack_from(">II", start, place)
        if not kind or length > len(start) - place - 8:
            return
        yield kind, start[place + 8 : place + 8 + length]
        place += 8 + -(-length // 8) * 8


def files_of(path: str, shape: str, offset: int = 0) -> list[str]:
    """Every local file and device that an image of format `shape` consists of, itself first, as the headers name them.

    Those that are not there among them. A file of which no header says what it is counts as what it looks like. What
    cannot be read ends it.
    """
    found: dict[str, None] = {}
    while path not in found and len(found) < _MOST:
        found[path] = None
        if shape == "raw":  # what a guest writes there must never be taken for a header
            break
        try:
            header = header_of(path, offset)
        except OSError:
            break
        if header is None:
            break
        if header.data_file.startswith("/"):
            found[header.data_file] = None
        below = backing(path, header)
        if below is None or not below.path.startswith("/"):
            break
        path, shape, offset = below.path, below.shape or "", 0
    return list(found)


def backing(image: str, header: Header) -> Backing | None:
    """What lies below an image that has this header, as QEMU takes the name; None for nothing."""
    if not header.backing:
        return None
    told = {"full-backing-filename": full_name(image, header.backing), "backing-filename-format": header.backing_shape}
    return backing_of(told)


def full_name(image: str, name: str) -> str:
    """A name in an image's header as QEMU takes it: beside the image, unless it is a whole path, or no path at all."""
    protocol, colon, rest = name.partition(":")
    if colon and "/" not in protocol:
        return rest if protocol == "file" else name
    return name if name.startswith("/") else os.path.normpath(Path(image).parent / name)
