"""The files of a mounted repository: what `restore` returns where ``restic mount`` works."""

from __future__ import annotations

import errno
import os
import stat
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from backupcore.errors import BackupError, IntegrityError, TargetUnavailable
from backupcore.model import Artifact, stream

if TYPE_CHECKING:
    from backupcore_restic.dump import DumpedArtifact
    from backupcore_restic.mount import Mount

__all__ = ["Mounted", "MountedArtifact"]

OPEN = 32  # files that stay open: restic looks up every blob of a file when it is opened
AHEAD = 256 << 10  # bytes that a small read of a merge takes along


class Mounted:
    """A mounted repository, as any process of this host sees it. Unpickled, it is read by a merge, in its own process.

    A merge goes through all layers of a chain at once, in small pieces, while a ``restic backup`` takes in what comes
    of it. For each read restic makes a whole blob, of up to 8 MiB, and where more of them are in use than it keeps, the
    same ones again and again: so a small read takes along what follows. It makes one blob twice where two threads want
    it, and holds all that are under way beside those it keeps: so one read waits for the other, unless the repository
    is far away, where waiting would cost more than the memory.
    """

    def __init__(self, place: Path, *, near: bool, ahead: int = 0) -> None:
        """`near`: the repository lies in a folder of this host. `ahead`: see `_File`."""
        self._place = place
        self._near = near
        self._ahead = ahead
        self._turn: AbstractContextManager[object] = threading.Lock() if near and ahead else nullcontext()
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._lock = threading.Lock()
        self.reading = 0
        """Reads that are under way in this process."""

    def __reduce__(self) -> tuple[Callable[[], Mounted], tuple[()]]:
        return partial(Mounted, self._place, near=self._near, ahead=AHEAD), ()

    def files(self, snapshot: str) -> dict[str, int] | None:
        """Name -> size of the plain files at a snapshot's root; None if it is not to be seen here."""
        try:
            with self._under_way(), os.scandir(self._place / snapshot) as entries:
                plain = [one for one in entries if one.is_file(follow_symlinks=False)]
                return {one.name: one.stat(follow_symlinks=False).st_size for one in plain}
        except OSError:
            return None  # restic says what is wrong when it is asked for the snapshot

    def read_into(self, file: str, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from ``snapshot/name`` and return how many bytes it got. OSError as the kernel gives it."""
        with self._under_way(), self._turn:
            return self._opened(file).read_into(offset, buffer)

    def opens(self, file: str) -> bool:
        """Whether ``snapshot/name`` can be opened here."""
        try:
            with self._under_way():
                self._opened(file)
        except OSError:
            return False
        return True

    def _opened(self, file: str) -> _File:
        with self._lock:
            found = self._files.pop(file, None) or _File(self._place / file, self._ahead)
            self._files[file] = found
            if len(self._files) > OPEN:
                self._files.popitem(last=False)  # closed by the last of its readers
        return found

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        with self._lock:
            self.reading += 1
        try:
            yield
        finally:
            with self._lock:
                self.reading -= 1

    def close(self) -> None:
        """Let go of the files."""
        with self._lock:
            self._files.clear()


class _File:
    """An open file. It is closed when nobody has it any more.

    Reads of less than `ahead` bytes are answered from as many, which stay in memory until another place is asked for.
    """

    def __init__(self, path: Path, ahead: int) -> None:
        self._ahead = ahead
        self._lock = threading.Lock()  # guards the two below
        self._memory = memoryview(b"")
        self._kept = range(0)  # the bytes of the file that are in it
        # Past the kernel's cache: what is read once need not lie there, and comes in requests of 128 KiB at once. What
        # a repository shows is not to be trusted: no link leads out of the mount, nothing but a plain file is read.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT | os.O_NOFOLLOW | os.O_NONBLOCK
        self.descriptor = os.open(path, flags)
        weakref.finalize(self, _close, self.descriptor)
        if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
            raise IntegrityError(f"{path.name} is no file")

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from `offset` on and return how many bytes it got: less than its length only at the end."""
        length = len(buffer)
        if length >= self._ahead:
            return self._fill(offset, buffer)
        with self._lock:
            if not self._kept.start <= offset <= offset + length <= self._kept.stop:
                self._kept = range(0)
                self._memory = self._memory or memoryview(bytearray(self._ahead))
                try:
                    self._kept = range(offset, offset + self._fill(offset, self._memory))
                except OSError:  # perhaps of what nobody has asked for: damage there is no failure of this read
                    return self._fill(offset, buffer)
            start = offset - self._kept.start
            count = min(length, len(self._kept) - start)
            buffer[:count] = self._memory[start : start + count]
        return count

    def _fill(self, offset: int, buffer: memoryview) -> int:
        done, failed = 0, -1
        while done < len(buffer):
            try:
                count = os.preadv(self.descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                if error.errno != errno.EIO or failed == done:
                    raise
                failed = done  # Ctrl-Z or a debugger breaks a request off, and restic answers that as it does damage
                continue
            if not count:
                break
            done += count
        return done


def _close(descriptor: int) -> None:
    with suppress(OSError):  # restic has ended before; the descriptor is free all the same
        os.close(descriptor)


class MountedArtifact(Artifact):
    """One file of a snapshot in a mounted repository; any part of it, from any thread.

    The mount says of a failed read no more than EIO: then ``restic dump`` of the same file tells why.
    """

    seekable = True

    def __init__(self, dumped: DumpedArtifact, mount: Mount, mounted: Mounted) -> None:
        """`dumped` is the same file without a mount; `mounted` is what `mount` has mounted."""
        self.name = dumped.name
        self.size = dumped.size
        self._dumped = dumped
        self._mount: Mount | None = mount
        self._mounted = mounted
        self._file = f"{dumped.snapshot}/{dumped.name}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mount": None}

    def open(self) -> BinaryIO:
        """The file from byte 0."""
        return stream(self) if self._mounted.opens(self._file) else self._dumped.open()

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`, or what is left."""
        buffer = bytearray(max(0, min(length, self.size - offset)))
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """The same into `buffer`."""
        due = max(0, min(len(buffer), self.size - offset))
        try:
            count = self._mounted.read_into(self._file, offset, buffer[:due])
        except OSError as error:
            raise self._reason(error, offset + due) from error
        if count != due:
            raise IntegrityError(f"{self._dumped.what}: only {count} of {due} bytes at {offset} came")
        return count

    def _reason(self, error: OSError, end: int) -> BackupError:
        """Why a read up to the byte `end` failed."""
        if self._mount is not None:
            return self._mount.reason(error, self._dumped, end)
        # In the process of a view, which knows no more: whoever started the mount does.
        if error.errno == errno.EIO:
            return self._dumped.reason(end)
        return TargetUnavailable(f"{self._dumped.what}: the repository is not mounted any more")
