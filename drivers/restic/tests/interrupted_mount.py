"""A mount that answers as restic's does when the kernel breaks off a request: EIO, once for each place.

Run with a mount point; it serves ``snapshot/disk``, 1 MiB of bytes that count up, of which the last quarter is damaged.
Unmounting ends it.
"""

from __future__ import annotations

import errno
import os
import stat
import sys

import mfusepy

SIZE = 1 << 20
DAMAGED = SIZE * 3 // 4
DATA = bytes(range(256)) * (SIZE // 256)


class Interrupted(mfusepy.Operations):
    def __init__(self) -> None:
        self._asked: set[int] = set()

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        if path.endswith("/disk"):
            return {"st_mode": stat.S_IFREG | 0o400, "st_size": SIZE, "st_nlink": 1}
        return {"st_mode": stat.S_IFDIR | 0o500, "st_nlink": 2}

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        if offset not in self._asked or offset + size > DAMAGED:
            self._asked.add(offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return DATA[offset : offset + size]


if __name__ == "__main__":
    mfusepy.FUSE(Interrupted(), sys.argv[1], foreground=True, nothreads=True, direct_io=True)
