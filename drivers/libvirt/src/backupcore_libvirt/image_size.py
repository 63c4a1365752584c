"""What an image itself says in its first bytes: no program is run, and no QEMU asked."""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from backupcore.disk.geometry import MAGIC
from backupcore_libvirt.backing import backing_of

__all__ = ["Below", "below", "by_header", "keeps_data_elsewhere", "lies_on_another", "stands_alone", "strange_kind"]

_SECTOR = 512
_START = struct.Struct(">4sIQIIQ")  # docs/interop/qcow2.txt: magic, version, backing name, cluster bits, size
_FEATURES, _FEATURES_AT = struct.Struct(">Q"), 72  # those that a program must know; of version 3 only
_DATA_FILE = 1 << 2
_LENGTH, _LENGTH_AT = struct.Struct(">I"), 100  # of the header, of version 3 only; extensions follow it
_LENGTH_OF_2 = 72
_EXTENSION = struct.Struct(">II")  # a kind, and a length; padded to 8 bytes
_FORMAT, _DATA_FILE_NAME = 0xE2792ACA, 0x44415441
_HEAD = 65536  # bytes in which all of that lies
_JSON = "json:"


@dataclass(frozen=True, slots=True)
class Below:
    """What a qcow2 header says of other files: what lies below (a whole path, or whatever else QEMU makes of it; ""
    for nothing), its format (None where nothing says it), and the file with the data ("" for the image itself).
    """

    path: str
    shape: str | None
    data_file: str


_KINDS = ((stat.S_ISFIFO, "a FIFO"), (stat.S_ISCHR, "a character device"), (stat.S_ISSOCK, "a socket"))


def strange_kind(path: str) -> str:
    """What is there, if it is neither a file, a folder nor a block device: reading such a thing may never end. Else "".

    libvirt reads it as well, where it is asked for the size of a disk that is off, and then answers nobody any more.
    """
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return ""  # whoever opens it says what is wrong
    return next((words for is_kind, words in _KINDS if is_kind(mode)), "")


def by_header(path: str, shape: str) -> int | None:
    """The size of an image of format `shape` (raw, qcow2), in whole sectors; None where it cannot be told.

    That of a running VM's is right, too: QEMU writes a new size into the header, or to the file, at once.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            mode = os.fstat(handle).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
                return None
            if shape == "raw":
                return -(-os.lseek(handle, 0, os.SEEK_END) // _SECTOR) * _SECTOR
            start = os.pread(handle, _START.size, 0)
        finally:
            os.close(handle)
    except OSError:
        return None
    if len(start) < _START.size or not start.startswith(MAGIC):
        return None
    return int(_START.unpack(start)[5])


def lies_on_another(path: str) -> bool:
    """Whether a qcow2 image has another one below it, as far as that can be told."""
    start = _start(path)
    return start is not None and bool(_START.unpack_from(start)[2])


def keeps_data_elsewhere(path: str) -> bool:
    """Whether a qcow2 image keeps its data in another file, as far as that can be told."""
    start = _start(path)
    return start is not None and _has_data_file(start)


def stands_alone(path: str) -> bool:
    """Whether a qcow2 image is there that has nothing below it and keeps its own data."""
    start = _start(path)
    return start is not None and not _START.unpack_from(start)[2] and not _has_data_file(start)


def below(path: str) -> Below | None:
    """What the header of a qcow2 image says of other files; None where there is no such header."""
    start = _start(path)
    if start is None:
        return None
    head = _first(path, _HEAD)
    _, version, place, length, *_ = _START.unpack_from(head)
    found = _extensions(head, _LENGTH.unpack_from(head, _LENGTH_AT)[0] if version >= 3 else _LENGTH_OF_2)
    shape = os.fsdecode(found[_FORMAT]) if _FORMAT in found else None
    name = os.fsdecode(head[place : place + length]) if place else ""
    if name and not name.startswith(_JSON):
        name = _whole(name, path)
    told = backing_of({"full-backing-filename": name, "backing-filename-format": shape})
    data = _whole(os.fsdecode(found.get(_DATA_FILE_NAME, b"")), path) if _has_data_file(start) else ""
    return Below(told.path, told.shape, data) if told else Below("", None, data)


def _extensions(head: bytes, at: int) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while at + _EXTENSION.size <= len(head):
        kind, length = _EXTENSION.unpack_from(head, at)
        if not kind:
            break
        at += _EXTENSION.size
        found[kind] = head[at : at + length]
        at += -(-length // 8) * 8
    return found


def _whole(name: str, image: str) -> str:
    """A name as QEMU takes it: from the folder of the image, unless it says a protocol."""
    name = name.removeprefix("file:")
    return name if not name or ":" in name.split("/", 1)[0] else str(Path(image).parent / name)


def _start(path: str) -> bytes | None:
    """The fixed part of a qcow2 header; None where there is none."""
    length = _FEATURES_AT + _FEATURES.size
    start = _first(path, length)
    return start if len(start) == length and start.startswith(MAGIC) else None


def _first(path: str, length: int) -> bytes:
    """The first bytes of a file, as many as there are; none where it cannot be read."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return file.read(length) or b""
    except OSError:
        return b""


def _has_data_file(start: bytes) -> bool:
    version = int(_START.unpack_from(start)[1])
    return version >= 3 and bool(_FEATURES.unpack_from(start, _FEATURES_AT)[0] & _DATA_FILE)
