"""The process that serves a file view: all that is known of FUSE and of mfusepy is here.

It is started by `backupcore.disk.fileview`; mfusepy is loaded in that process only. On standard input it gets, pickled,
the mount point and the list of artifacts; on standard output it sends pickled pairs:

- ``("ready", "")``: the view is mounted;
- ``("refused", reason)``: it cannot be, and no artifact was read;
- ``("broken", reason)``: the artifacts cannot be used in another process;
- ``("failed", error)``: the first read that failed; `error` is a BackupError. Every further read fails.

When standard input ends, the process unmounts the view and ends, so a parent that was killed leaves no mount behind;
after a byte it ends at once, since the parent has unmounted. PR_SET_PDEATHSIG would not do: it fires when the *thread*
that started the process ends, and it cannot wait for a mount that is just being made.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pickle
import stat
import subprocess
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, BinaryIO

from backupcore.disk.crossing import crossing
from backupcore.disk.mountpoints import unmount_command
from backupcore.errors import BackupError, ContractViolation, from_os_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from backupcore.model import Artifact

_THREADS = 128  # reads that may wait at once
_TIMEOUT = 3600  # seconds that the kernel may keep names and sizes: they never change


class Files:
    """The operations of the file system: one folder, with the artifacts as read-only files of exact size."""

    use_ns = True  # mfusepy: times in nanoseconds

    def __init__(self, artifacts: Sequence[Artifact], messages: Messages, mounted: threading.Event) -> None:
        self._artifacts = list(artifacts)
        self._handles = {f"/{artifact.name}": number for number, artifact in enumerate(artifacts)}
        self._messages = messages
        self._mounted = mounted
        self._failed = False
        self._time = time.time_ns()

    def init(self, _path: str) -> None:
        """The kernel's first request: the view is mounted."""
        self._mounted.set()
        self._messages.send("ready", "")

    def getattr(self, path: str, _handle: int | None = None) -> dict[str, int]:
        """The attributes of the folder or of a file."""
        times = dict.fromkeys(("st_atime", "st_mtime", "st_ctime"), self._time)
        owner = {"st_uid": os.getuid(), "st_gid": os.getgid()}
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o500, "st_nlink": 2, **owner, **times}
        size = self._artifacts[self._find(path)].size
        blocks = -(-size // 512)
        return {"st_mode": stat.S_IFREG | 0o400, "st_nlink": 1, "st_size": size, "st_blocks": blocks, **owner, **times}

    def readdir(self, _path: str, _handle: int) -> list[str]:
        """The names in the folder."""
        return [".", "..", *(artifact.name for artifact in self._artifacts)]

    def open(self, path: str, flags: int) -> int:
        """A handle for the file: its number."""
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return self._find(path)

    def read_into(self, handle: int, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` with the bytes from `offset` on and return how many, or EIO once any read has failed."""
        artifact = self._artifacts[handle]
        if not self._failed:
            try:
                return _exactly(artifact, offset, buffer[: max(0, min(len(buffer), artifact.size - offset))])
            except BaseException as error:  # noqa: BLE001 - whatever it is: the parent hears of it, the reader gets EIO
                self._fail(artifact.name, error)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def read(self, _path: str, size: int, offset: int, handle: int) -> bytes:
        """What tells mfusepy that files can be read; reads themselves go to `read_into`."""
        buffer = bytearray(size)
        return bytes(buffer[: self.read_into(handle, offset, memoryview(buffer))])

    def _find(self, path: str) -> int:
        try:
            return self._handles[path]
        except KeyError:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT)) from None

    def _fail(self, name: str, error: BaseException) -> None:
        self._failed = True
        self._messages.send("failed", _presentable(name, error))


class Messages:
    """The way to the parent; safe from several threads."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lock = threading.Lock()

    def send(self, kind: str, content: str | BackupError) -> None:
        """Send one pair; a parent that is gone does not matter here."""
        data = pickle.dumps((kind, content))
        with self._lock:
            try:
                self._file.write(data)
                self._file.flush()
            except OSError:
                pass


def _exactly(artifact: Artifact, offset: int, buffer: memoryview) -> int:
    count = artifact.read_into(offset, buffer)
    if count != len(buffer):
        raise ContractViolation(f"{artifact.name} gave {count} of {len(buffer)} bytes at {offset} of {artifact.size}")
    return count


def _presentable(name: str, error: BaseException) -> BackupError:
    """The error as a member of the taxonomy that survives being pickled."""
    if isinstance(error, OSError) and not isinstance(error, BackupError):
        return from_os_error(error, f"reading {name}")
    crossed = crossing(error)
    if isinstance(crossed, BackupError):
        return crossed
    traceback.print_exception(error)  # the parent's log has it
    return BackupError(f"reading {name} failed: {type(error).__name__}: {error}")


def _library() -> None:
    """Tell mfusepy which libfuse to load: its own search runs ldconfig and compilers, for up to a second."""
    if "FUSE_LIBRARY_PATH" in os.environ:
        return
    for name in ("libfuse3.so.4", "libfuse3.so.3", "libfuse.so.2"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        os.environ["FUSE_LIBRARY_PATH"] = name
        return
    raise OSError("no libfuse3 found")


def _end_with_parent(stdin: BinaryIO, mountpoint: str, mounted: threading.Event) -> None:
    """Wait for the end of standard input, then end this process. Never returns."""
    if not stdin.read(1):
        mounted.wait(5)  # a mount that is just being made would stay
        if command := unmount_command():
            subprocess.run([command, "-u", "-z", mountpoint], check=False, capture_output=True)
    os._exit(0)  # the threads of FUSE may wait for a disk that does not answer


def main() -> None:
    """Serve one view until it is unmounted or the parent is gone."""
    stdin = sys.stdin.buffer
    messages = Messages(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # whatever else prints must not get between the messages
    try:
        mountpoint: str = pickle.load(stdin)  # noqa: S301 - from the parent, over a pipe
        artifacts: list[Artifact] = pickle.load(stdin)  # noqa: S301 - as above
    except BaseException as error:  # noqa: BLE001 - what unpickling runs is the artifacts' own code
        traceback.print_exception(error)
        messages.send("broken", f"{type(error).__name__}: {error}")
        return
    mounted = threading.Event()
    watch = (stdin, mountpoint, mounted)
    threading.Thread(target=_end_with_parent, args=watch, name="parent", daemon=True).start()
    try:
        _library()
        import mfusepy  # noqa: PLC0415 - it loads libfuse when it is imported

        options: dict[str, Any] = {
            "foreground": True,
            "fsname": "backupcore",
            "ro": True,
            "direct_io": True,  # reads come in the reader's own size, not in pages of the kernel's cache
            "attr_timeout": _TIMEOUT,
            "entry_timeout": _TIMEOUT,
        }
        if (mfusepy.fuse_version_major, mfusepy.fuse_version_minor) >= (3, 12):
            # Its default became 10 then: that many waiting readers of sums would keep the disks from being read.
            options["max_threads"] = _THREADS
        files = Files(artifacts, messages, mounted)
        thread = threading.local()

        class Mount(mfusepy.FUSE):  # type: ignore[misc]  # mfusepy publishes no types
            """A FUSE whose reads go straight into libfuse's buffer; mfusepy's own take bytes and copy them."""

            def read(self, _path: bytes, buffer: Any, size: int, offset: int, info: Any) -> int:
                if not hasattr(thread, "known"):
                    # libfuse's threads are not Python's: for each call ctypes makes a state of a thread and throws it
                    # away again, a tenth of what the view costs. Held once, it lasts as long as its thread.
                    ctypes.pythonapi.PyGILState_Ensure()
                    thread.known = True
                place = (ctypes.c_ubyte * size).from_address(ctypes.addressof(buffer.contents))
                return files.read_into(info.contents.fh, offset, memoryview(place).cast("B"))

        Mount(files, mountpoint, **options)
    except BaseException as error:  # noqa: BLE001 - libfuse says more on stderr, which the parent has
        if not mounted.is_set():
            messages.send("refused", f"{type(error).__name__}: {error}")
        else:
            traceback.print_exception(error)
    mounted.set()
    os._exit(0)


if __name__ == "__main__":
    main()
