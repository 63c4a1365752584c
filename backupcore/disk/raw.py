"""Restored disks that are raw: a sparse file, or a block device that is there already."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from backupcore.disk.extents import CLUSTER
from backupcore.disk.open_devices import writers
from backupcore.disk.output import Output
from backupcore.errors import Busy, ConfigError, from_os_error

__all__ = ["DeviceWriter", "RawWriter"]

_BLKZEROOUT = 0x127F  # <linux/fs.h>: two 64-bit numbers, offset and length
_ZEROS = bytes(1 << 20)


class RawWriter:
    """Writes one new raw file, sparse: what is never written takes no room. `path` must not exist yet."""

    def __init__(self, path: Path, virtual_size: int) -> None:
        self._name = str(path)
        with self._translated("creating"):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(self._fd, virtual_size)
            except OSError:
                os.close(self._fd)
                raise
        self._output = Output(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._output.close()
        os.close(self._fd)

    def write(self, offset: int, data: memoryview) -> None:
        """Put `data` at the guest offset."""
        with self._translated("writing"):
            self._output.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Let the range read as zeros: in a new file it does."""

    def finish(self) -> None:
        """When this returns the file is on stable storage."""
        with self._translated("writing"):
            os.fsync(self._fd)

    @contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise from_os_error(error, f"{doing} {self._name}") from error


class DeviceWriter(RawWriter):
    """Writes onto a block device, whose contents are lost.

    What lies beyond the disk's end stays, or with `rest` becomes zeros: on a device that was made for this disk it is
    what others have left there, and the guest would see it.

    The first cluster, by which a disk is recognized, comes last: a restore that was cut off leaves none that could be
    taken for one. ConfigError if it is no block device or too small, or holds something and `overwrite` is not said;
    Busy if it is mounted, another part of the system holds it, or another process, a QEMU for one, writes to it.
    """

    def __init__(self, path: Path, virtual_size: int, *, overwrite: bool = False, rest: bool = False) -> None:
        self._name = str(path)
        self._end = virtual_size
        self._rest = rest
        with self._translated("opening"):
            if not stat.S_ISBLK(path.stat().st_mode):
                raise ConfigError(f"{path} is no block device", "For a file: --to and --name.")
            try:
                self._fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    raise Busy(f"{path} is in use", "Is it mounted, or part of a volume group?") from error
                raise
        self._output = Output(self._fd)
        try:
            self._prepare(virtual_size, overwrite=overwrite)
        except BaseException:
            self._output.close()
            os.close(self._fd)
            raise
        self._first = b""

    def _prepare(self, virtual_size: int, *, overwrite: bool) -> None:
        with self._translated("reading"):
            others = writers(os.fstat(self._fd).st_rdev)
            if others:
                raise Busy(
                    f"{self._name} is open for writing in {', '.join(others)}",
                    "If that is a VM: power it off. Or choose another device.",
                )
            size = os.lseek(self._fd, 0, os.SEEK_END)
            first = os.pread(self._fd, len(_ZEROS), 0)
        if size < virtual_size:
            raise ConfigError(f"{self._name} has {size} bytes, the disk {virtual_size}", "Choose a larger one.")
        if first.strip(b"\0") and not overwrite:
            raise ConfigError(f"{self._name} is not empty", "What it holds would be lost: say --overwrite.")
        self.zero(0, min(CLUSTER, virtual_size))

    def write(self, offset: int, data: memoryview) -> None:
        """Put `data` at the guest offset."""
        if offset == 0:
            self._first = bytes(data[:CLUSTER])
            offset, data = CLUSTER, data[CLUSTER:]
        super().write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Write zeros, which the device may do by itself."""
        with self._translated("writing"):
            end = offset + length
            try:
                fcntl.ioctl(self._fd, _BLKZEROOUT, struct.pack("QQ", offset, length - length % 512))
                offset += length - length % 512
            except OSError:
                pass  # not every device can
        while offset < end:
            count = min(end - offset, len(_ZEROS))
            super().write(offset, memoryview(_ZEROS)[:count])
            offset += count

    def finish(self) -> None:
        """When this returns all of it is on stable storage."""
        if self._rest:
            with self._translated("reading"):
                size = os.lseek(self._fd, 0, os.SEEK_END)
            self.zero(self._end, size - self._end)
        super().finish()
        super().write(0, memoryview(self._first))
        super().finish()
