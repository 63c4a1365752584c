"""Empty qcow2 images, made by ourselves before the guest is brought to rest, for QEMU to write to.

Left to itself libvirt has QEMU make them, by a job, one after the other, within the call that fixes the instant. QEMU
7.2 dies where somebody asks for its block nodes meanwhile, as every exporter of statistics does (``qcow2.c:
qcow2_get_specific_info: Assertion``, a node half made), and the guest stands still for longer. An image that is there
already is opened, and nothing else.

libvirt takes such an image as it finds it, and removes it neither when its job ends nor when that fails. So each is
made for one attempt, never used again, and whoever has it made removes it.
"""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

from backupcore.disk.extents import CLUSTER
from backupcore.disk.geometry import MAGIC
from backupcore.disk.qcow2 import Layout
from backupcore.errors import HypervisorError, from_os_error
from backupcore_libvirt.scratch import Owner

__all__ = ["is_untouched", "make_empty", "make_overlay", "write_new"]

# Of a header, as QEMU's docs/interop/qcow2.txt has it: where the offset and the length of the backing file's name
# stand, where the disk's size, and where the extensions begin, the first of which names the backing file's format.
_BACKING, _BACKING_AT = struct.Struct(">QI"), 8
_SIZE, _SIZE_AT = struct.Struct(">Q"), 24
_EXTENSION, _EXTENSIONS_AT = struct.Struct(">II"), 104  # a kind, and a length
_FORMAT_EXTENSION = 0xE2792ACA
_NO_MORE = bytes(8)
_LONGEST_NAME = 1023  # bytes of a backing file's name
_LONGEST_SHAPE = 16
_LARGEST = 1 << 51  # bytes of a disk: qcow2 with our clusters


def make_empty(path: Path, size: int, owner: Owner) -> None:
    """Make an image of `size` bytes that holds nothing and has nothing below it, mode 0600, for `owner`.

    The size is QEMU's own of the disk, in whole sectors: a backup job takes no scratch image of another.
    AccessDenied, TargetFull; ConfigError where the name is taken.
    """
    _write(path, bytearray(_tables(size)), owner, 0o600)


def make_overlay(path: Path, size: int, below: str, shape: str, owner: Owner | None = None) -> None:
    """Make an image of `size` bytes that holds nothing, on the file or device `below` of format `shape`; it is on the
    disk when this returns.

    It gets the owner and the mode of the file below; with `owner` it is that one's alone.

    AccessDenied, TargetFull, NotFound; HypervisorError where a header cannot hold the name of the file below.
    """
    name = os.fsencode(below)
    if len(name) > _LONGEST_NAME:
        raise HypervisorError(f"the path {below} has {len(name)} bytes; a qcow2 header holds {_LONGEST_NAME}")
    try:
        model = Path(below).stat()
    except OSError as error:
        raise from_os_error(error, below) from error
    tables = _overlay_tables(size, name, shape.encode())
    if owner is not None:
        _write(path, tables, owner, 0o600)
    else:
        _write(path, tables, Owner(model.st_uid, model.st_gid), stat.S_IMODE(model.st_mode))
    try:
        # The definition will name it: a host that loses its power must not lose it.
        for written in (path, path.parent):
            _sync(written)
    except OSError as error:
        raise from_os_error(error, str(path)) from error


def is_untouched(path: Path) -> bool:
    """Whether a file is, to the byte, an image that `make_overlay` has made: nothing was ever written to it.

    Or the beginning of one, whose making was cut off.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return False
            header = file.read(CLUSTER)
            if not header:
                return True
            if not header.startswith(MAGIC):
                return False
            offset, length = _BACKING.unpack_from(header, _BACKING_AT)
            (size,) = _SIZE.unpack_from(header, _SIZE_AT)
            _, kind = _EXTENSION.unpack_from(header, _EXTENSIONS_AT)
            name = header[offset : offset + length]
            shape = header[_EXTENSIONS_AT + _EXTENSION.size :][:kind]
            if not 0 < size <= _LARGEST or not 0 < length <= _LONGEST_NAME or not 0 < kind <= _LONGEST_SHAPE:
                return False
            made = _overlay_tables(size, name, shape)
            return made.startswith(header + file.read(len(made)))
    except (OSError, struct.error):
        return False


def _overlay_tables(size: int, below: bytes, shape: bytes) -> bytearray:
    tables = bytearray(_tables(size))
    more = _EXTENSION.pack(_FORMAT_EXTENSION, len(shape)) + shape.ljust(-(-len(shape) // 8) * 8, b"\0") + _NO_MORE
    _BACKING.pack_into(tables, _BACKING_AT, _EXTENSIONS_AT + len(more), len(below))
    tables[_EXTENSIONS_AT : _EXTENSIONS_AT + len(more) + len(below)] = more + below
    return tables


def _tables(size: int) -> bytes:
    """The whole file of a disk that holds nothing."""
    layout = Layout(size, ())
    return layout.tables(0, layout.size)


def write_new(path: Path, image: bytearray) -> None:
    """Make a file of our own that nobody else may read; ConfigError where the name is taken."""
    _write(path, image, Owner(os.geteuid(), os.getegid()), 0o600)


def _write(path: Path, tables: bytearray, owner: Owner, mode: int) -> None:
    try:
        # A new file for certain: what lies in the folder of QEMU's user may be anything, a link among it.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                for start in range(0, len(tables), CLUSTER):
                    file.seek(start)
                    file.write(tables[start : start + CLUSTER].rstrip(b"\0"))  # the rest of each cluster is a hole
                file.truncate(len(tables))
                os.fchmod(handle, mode)
                if os.geteuid() == 0:
                    os.fchown(handle, owner.uid, owner.gid)
        except OSError:
            path.unlink(missing_ok=True)  # half an image
            raise
    except OSError as error:
        raise from_os_error(error, str(path)) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
