"""A file system whose writes never return while a flag file exists: what a hard NFS mount is whose server is gone.

    with blocking(folder) as target: ...        target.path; target.block(), target.unblock()

A process of its own passes every call through to an ordinary folder, by FUSE. A caller whose request was taken and not
answered cannot be ended, not even by SIGKILL: it then sleeps in state D, as with the kernel's NFS client.
"""

# ruff: noqa: PTH101, PTH102, PTH104, PTH106, PTH108, PTH115, PTH208, PTH211 - the system's calls, passed on one for one

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 30.0


@dataclass(frozen=True)
class Blocking:
    """A mounted one: `path` is where, `flag` the file whose presence blocks it."""

    path: Path
    flag: Path

    def block(self, *operations: str) -> None:
        """From now on no write, sync, create, rename or removal returns; or, if named, none of these calls (``read``).

        What waits already goes on waiting.
        """
        self.flag.write_text(" ".join(operations))

    def unblock(self) -> None:
        """They go on, those that wait as well."""
        self.flag.unlink(missing_ok=True)


@contextmanager
def blocking(folder: Path, *, links: bool = True, locks: bool = True) -> Iterator[Blocking]:
    """Mount one below `folder` for the time of the block. What still waits at its end gets an error.

    With `links` false it knows no hard links, as vfat and exFAT, and says so as they do. With `locks` false every lock
    is granted, and keeps nobody out. Everybody may use it.
    """
    source, path, flag = folder / "blocking-source", folder / "blocking", folder / "blocking-flag"
    source.mkdir()
    source.chmod(0o777)
    path.mkdir()
    command = [
        sys.executable,
        "-m",
        "lab.blocking_fs",
        str(source),
        str(path),
        str(flag),
        *([] if links else ["links"]),
        *([] if locks else ["locks"]),
    ]
    server = subprocess.Popen(command, cwd=Path(__file__).parent.parent, start_new_session=True)
    try:
        deadline = time.monotonic() + LIMIT
        while not path.is_mount():
            if time.monotonic() > deadline or server.poll() is not None:
                raise TimeoutError(f"{path} was not mounted")
            time.sleep(0.02)
        yield Blocking(path, flag)
    finally:
        flag.unlink(missing_ok=True)
        subprocess.run(["fusermount3", "-u", "-z", str(path)], check=False, capture_output=True)
        try:
            server.wait(2)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def state(process: int) -> str:
    """D, S, T, Z, … as ``/proc/PID/stat`` has it, the worst of the process's threads; "" if it is gone."""
    found = []
    for path in Path(f"/proc/{process}/task").glob("*/stat"):
        try:
            found.append(path.read_text().rpartition(")")[2].split()[0])
        except OSError:
            continue
    return "D" if "D" in found else (found[0] if found else "")


class _Through:
    """Every call, passed on to the folder."""

    use_ns = True

    def __init__(self, source: str, flag: str, *, links: bool) -> None:
        self._source = source
        self._flag = flag
        self._links = links

    def _there(self, path: str) -> str:
        return self._source + path

    def _wait(self, operation: str, *, reads: bool = False) -> None:
        if not os.path.exists(self._flag):  # noqa: PTH110 - thousands of times
            return
        with suppress(FileNotFoundError):
            named = Path(self._flag).read_text().split()
            blocked = operation in named if named else not reads
            while blocked and os.path.exists(self._flag):  # noqa: PTH110 - as above
                time.sleep(0.02)

    def getattr(self, path: str, _handle: int | None = None) -> dict[str, int]:
        self._wait("getattr", reads=True)
        found = os.lstat(self._there(path))
        names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks")
        times = {name: getattr(found, f"{name}_ns") for name in ("st_atime", "st_mtime", "st_ctime")}
        return {**{name: getattr(found, name) for name in names}, **times}

    def readdir(self, path: str, _handle: int) -> list[str]:
        self._wait("readdir", reads=True)
        return [".", "..", *os.listdir(self._there(path))]

    def readlink(self, path: str) -> str:
        return os.readlink(self._there(path))

    def statfs(self, path: str) -> dict[str, int]:
        self._wait("statfs", reads=True)
        found = os.statvfs(self._there(path))
        names = (
            "f_bavail",
            "f_bfree",
            "f_blocks",
            "f_bsize",
            "f_favail",
            "f_ffree",
            "f_files",
            "f_frsize",
            "f_namemax",
        )
        return {name: getattr(found, name) for name in names}

    def access(self, path: str, mode: int) -> int:
        if not os.access(self._there(path), mode):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return 0

    def open(self, path: str, flags: int) -> int:
        self._wait("open", reads=True)
        return os.open(self._there(path), flags & ~(os.O_CREAT | os.O_EXCL | os.O_DIRECT))

    def read(self, _path: str, size: int, offset: int, handle: int) -> bytes:
        self._wait("read", reads=True)
        return os.pread(handle, size, offset)

    def release(self, _path: str, handle: int) -> int:
        os.close(handle)
        return 0

    def flush(self, _path: str, _handle: int) -> int:
        return 0

    def create(self, path: str, mode: int, _info: Any = None) -> int:
        self._wait("create")
        return os.open(self._there(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

    def write(self, _path: str, data: bytes, offset: int, handle: int) -> int:
        self._wait("write")
        return os.pwrite(handle, data, offset)

    def fsync(self, _path: str, _datasync: int, handle: int) -> int:
        self._wait("fsync")
        os.fsync(handle)
        return 0

    def fsyncdir(self, _path: str, _datasync: int, _handle: int) -> int:
        self._wait("fsyncdir")
        return 0

    def truncate(self, path: str, length: int, _handle: int | None = None) -> int:
        self._wait("truncate")
        os.truncate(self._there(path), length)
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        self._wait("mkdir")
        os.mkdir(self._there(path), mode)
        return 0

    def unlink(self, path: str) -> int:
        self._wait("unlink")
        os.unlink(self._there(path))
        return 0

    def rmdir(self, path: str) -> int:
        self._wait("rmdir")
        os.rmdir(self._there(path))
        return 0

    def rename(self, old: str, new: str, _flags: int = 0) -> int:
        self._wait("rename")
        os.rename(self._there(old), self._there(new))
        return 0

    def link(self, target: str, source: str) -> int:
        self._wait("link")
        if not self._links:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        os.link(self._there(source), self._there(target))
        return 0

    def symlink(self, target: str, source: str) -> int:
        self._wait("symlink")
        os.symlink(source, self._there(target))
        return 0

    def chmod(self, path: str, mode: int) -> int:
        self._wait("chmod")
        os.chmod(self._there(path), mode)
        return 0

    def chown(self, path: str, uid: int, gid: int) -> int:
        self._wait("chown")
        os.chown(self._there(path), uid, gid, follow_symlinks=False)
        return 0

    def utimens(self, path: str, times: tuple[int, int]) -> int:
        self._wait("utimens")
        os.utime(self._there(path), ns=times, follow_symlinks=False)
        return 0


def main() -> None:
    source, path, flag, *lacking = sys.argv[1:]
    for name in ("libfuse3.so.4", "libfuse3.so.3"):  # Debian 13's, 12's; mfusepy's own search runs compilers
        with suppress(OSError):
            ctypes.CDLL(name)
            os.environ.setdefault("FUSE_LIBRARY_PATH", name)
    import mfusepy  # noqa: PLC0415 - it loads libfuse when it is imported

    class WithoutLocks(_Through):
        def lock(self, _path: str, _handle: int, _command: int, lock: Any) -> int:
            # The field l_type: whoever asks is told that it is free.
            ctypes.cast(lock, ctypes.POINTER(ctypes.c_short))[0] = fcntl.F_UNLCK
            return 0

    kind = WithoutLocks if "locks" in lacking else _Through
    mfusepy.FUSE(
        kind(source, flag, links="links" not in lacking),
        path,
        foreground=True,
        fsname="lab-blocking",
        allow_other=True,
        max_threads=128,  # requests that wait hold a thread each
    )


if __name__ == "__main__":
    main()
