"""A folder of this host, with system calls. rsync copies only where it was given options: it adds nothing here."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from itertools import count, cycle
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from backupcore.disk.output import Output
from backupcore.disk.reader import memory
from backupcore.errors import AccessDenied, ContractViolation, IntegrityError, TargetUnavailable, from_os_error
from backupcore.model import Artifact, Usage, new_id
from backupcore.mounts import unmounted
from backupcore.typed import typed
from backupcore_rsync.layout import (
    LABELS,
    MANIFEST,
    MARKER,
    MARKER_LIMIT,
    OLD,
    Token,
    begun,
    identity,
    label_names,
    part,
)
from backupcore_rsync.place import Upload, changed, differing, expected

if TYPE_CHECKING:
    from backupcore import Context
    from backupcore.model import BackupRun

__all__ = ["Folder"]

_STEP = 4 << 20  # bytes that are read and written at once: as much as a disk is received without a copy for
_TRIES = 5  # to make a folder in that of a VM, which others may just be removing


class Folder:
    """A target on a file system of this host."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def name(self) -> str:
        """How messages call it."""
        return str(self._path)

    def _no_folder(self) -> TargetUnavailable:
        return TargetUnavailable(
            f"{self._path} is no folder", f"Mount it, or create it: {typed('mkdir', str(self._path))}"
        )

    def check(self, ctx: Context) -> None:
        """It is there, is not the mount point of a disk that is missing, and can be written to."""
        missing = unmounted(self._path)
        if missing:
            raise TargetUnavailable(f"{self._path}: nothing is mounted at {missing}", f"Mount it: mount {missing}")
        if not self._path.is_dir():
            raise self._no_folder()
        if not os.access(self._path, os.R_OK | os.W_OK | os.X_OK):
            raise AccessDenied(
                f"{self._path} cannot be written to", "Check its owner, and whether it is mounted read-only."
            )

    def ready(self, run: BackupRun, ctx: Context) -> None:
        """`check`, and remove what dead runs of this installation have left unfinished for this VM, in the end."""
        self.check(ctx)
        ctx.on_touch(lambda: self._sweep(run, ctx))

    def _sweep(self, run: BackupRun, ctx: Context) -> None:
        for entry in _entries(self._path / run.vm.uuid):
            ctx.check()
            of_ours = begun(entry.name, run) if entry.is_dir(follow_symlinks=False) else None
            if of_ours is None:
                continue
            try:
                with _held(Path(entry.path)) as free:
                    over = of_ours.is_over if of_ours.life else _untouched(Path(entry.path))
                    if free and over:
                        ctx.log.info("removing what a run that was killed has left: %s", entry.path)
                        shutil.rmtree(entry.path)
            except FileNotFoundError:  # its own run has ended it meanwhile
                continue
            except OSError as error:
                ctx.log.warning("what a run that was killed has left stays: %s: %s", entry.path, error.strerror)

    def identity(self, ctx: Context, *, make: bool) -> str | None:
        """The marker gets its name by a link, which only the first can make."""
        found = self._marker()
        if found is None and make:
            self.check(ctx)
            made = self._path / f"{MARKER}.{new_id()}"
            _write_new(made, f"{new_id()}\n".encode())
            try:
                with suppress(FileExistsError):
                    _give_name(made, self._path / MARKER)
                _sync(self._path)
            finally:
                made.unlink(missing_ok=True)
            found = self._marker()
        return None if found is None else identity(found, self.name)

    def _marker(self) -> bytes | None:
        try:
            handle = os.open(self._path / MARKER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError as error:
            if not self._path.is_dir():
                raise self._no_folder() from error
            return None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, or a socket
                return b""
            raise
        try:
            return os.read(handle, MARKER_LIMIT) if stat.S_ISREG(os.fstat(handle).st_mode) else b""
        finally:
            os.close(handle)

    def files(self, folders: Iterable[str] | None, ctx: Context, *, vm: str = "") -> dict[str, int]:
        """The plain files in these folders, or of all backups (of `vm`). Links are nothing of ours."""
        if not self._path.is_dir():
            raise TargetUnavailable(f"{self._path} is no folder", "Is it mounted?")
        return dict(self._files(self._folders(vm) if folders is None else folders, ctx))

    def _folders(self, only: str) -> Iterator[str]:
        for vm in _entries(self._path):
            if only and vm.name != only:
                continue
            for one in _entries(self._path / vm.name) if vm.is_dir(follow_symlinks=False) else ():
                if Token.parse(f"{vm.name}.{one.name}"):
                    yield f"{vm.name}/{one.name}"

    def _files(self, folders: Iterable[str], ctx: Context) -> Iterator[tuple[str, int]]:
        for folder in folders:
            ctx.check()
            if not self._is_ours(folder):
                continue
            for below in ("", f"{LABELS}/"):
                for entry in _entries(self._path / folder / below):
                    if entry.is_file(follow_symlinks=False):
                        yield f"{folder}/{below}{entry.name}", entry.stat(follow_symlinks=False).st_size

    def _is_ours(self, folder: str) -> bool:
        """Neither the backup's folder nor the VM's is a link that leads elsewhere."""
        path = self._path / folder
        return not path.parent.is_symlink() and not path.is_symlink() and path.is_dir()

    def holds_backups(self, ctx: Context) -> bool:
        """True if any VM has a folder there."""
        return any(Token.parse(f"{entry.name}.{'0' * 32}") for entry in _entries(self._path))

    def store(self, upload: Upload) -> None:
        """By rsync."""
        with self._publishing(upload.token, upload.run, upload.ctx, upload.sizes) as folder:
            # Not --sparse: the artifacts hold no runs of zeros, and looking for them costs a pass over every byte.
            upload.copy([f"{upload.view}/", str(upload.labels)], f"{folder}/", ["--inplace"])
            name = str(folder.relative_to(self._path))
            upload.check(self.files([name], upload.ctx), name)

    def write(self, artifacts: Sequence[Artifact], token: Token, run: BackupRun, ctx: Context) -> None:
        """Without rsync, and so without a view in which it could read the artifacts."""
        sizes = {artifact.name: artifact.size for artifact in artifacts}
        with self._publishing(token, run, ctx, sizes) as folder:
            labels = folder / LABELS
            labels.mkdir(mode=0o700)
            for name in label_names(run):
                (labels / name).touch(mode=0o600)
            done = 0
            for artifact in artifacts:
                _write(artifact, folder / artifact.name, ctx, done)
                done += artifact.size

    @contextmanager
    def _publishing(self, token: Token, run: BackupRun, ctx: Context, sizes: Mapping[str, int]) -> Iterator[Path]:
        """A hidden folder to write to; then every file and folder of it goes to the disk; then one rename.

        It is locked until then, so that whoever shares the file system sees that somebody is at work on it. Where that
        cannot be, its name tells. What is published is what was written: names and sizes are looked at in the end.
        """
        vm = self._path / token.vm
        folder = vm / part(token, run)
        for tries in count(1):
            with suppress(FileExistsError):
                vm.mkdir(mode=0o700)
                _sync(self._path)
            try:
                folder.mkdir(mode=0o700)
            except FileNotFoundError:  # whoever removes the VM's last backup takes the empty folder along
                if tries == _TRIES:  # it is a link to nowhere
                    raise
            else:
                break
        with _held(folder):
            yield folder
            for place, _, names in os.walk(folder):
                for file in names:
                    ctx.check()
                    path = Path(place, file)
                    # An empty one, as every label is, has nothing but its name, which the folder's sync takes along;
                    # each sync of its own waits for the disk once more.
                    if path.stat().st_size:
                        _sync(path)
                _sync(Path(place))
        ctx.check()
        name = str(folder.relative_to(self._path))
        if wrong := differing(expected(sizes, run), self.files([name], ctx), name):
            raise changed(self.name, wrong)
        folder.rename(vm / token.id)
        _sync(vm)

    def abandon(self, token: Token, run: BackupRun, ctx: Context) -> None:
        """Remove the hidden folder, or the published one if only the last step failed."""
        self._remove(token)
        with suppress(FileNotFoundError):
            shutil.rmtree(self._path / token.vm / part(token, run))
        self._remove_if_empty(token)

    def artifact(self, token: Token, name: str, size: int, ctx: Context) -> Artifact:
        """The file itself, read where it lies."""
        return FileArtifact(self._path / token.folder / name, name, size)

    def remove(self, tokens: Sequence[Token], ctx: Context) -> None:
        """One after the other."""
        if not self._path.is_dir():  # else a disk that is not mounted would count as deleted
            raise TargetUnavailable(f"{self._path} is no folder", "Is it mounted?")
        for token in tokens:
            ctx.check()
            self._remove(token)
            self._remove_if_empty(token)

    def _remove(self, token: Token) -> None:
        if not self._is_ours(token.folder):
            return
        folder = self._path / token.folder
        with suppress(FileNotFoundError):
            (folder / MANIFEST).unlink()
            _sync(folder)  # what is half deleted is no backup any more, also after a power cut
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)

    def _remove_if_empty(self, token: Token) -> None:
        with suppress(OSError):  # the usual: there are other backups of this VM
            (self._path / token.vm).rmdir()

    def room(self, ctx: Context) -> Usage:
        """Of the file system that the folder lies in."""
        room = os.statvfs(self._path)
        return Usage(total=room.f_blocks * room.f_frsize, free=room.f_bavail * room.f_frsize)


class FileArtifact(Artifact):
    """A file of the target. It is opened for every read, and never by way of a link."""

    def __init__(self, path: Path, name: str, size: int) -> None:
        self._path = path
        self.name = name
        self.size = size

    def _open(self) -> int:
        try:
            # Not blocking: in the place of the file may be a FIFO.
            handle = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise IntegrityError(f"{self._path} is missing", "Verify the image.") from error
        except OSError as error:
            raise from_os_error(error, f"opening {self._path}") from error
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return handle
        os.close(handle)
        raise IntegrityError(f"{self._path} is no plain file", "Somebody has put it there: look at the target.")

    def open(self) -> BinaryIO:
        """The file from byte 0, to its end: whether that is where it should be, the core looks at."""
        return os.fdopen(self._open(), "rb", 1 << 20)

    def read_at(self, offset: int, length: int) -> bytes:
        """A range of the file."""
        buffer = bytearray(max(0, min(length, self.size - offset)))
        return bytes(memoryview(buffer)[: self.read_into(offset, memoryview(buffer))])

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """`read_at` straight into `buffer`."""
        handle = self._open()
        try:
            done = 0
            while done < len(buffer) and (count := os.preadv(handle, [buffer[done:]], offset + done)):
                done += count
            return done
        finally:
            os.close(handle)


def _write(artifact: Artifact, path: Path, ctx: Context, before: int) -> None:
    """A new file with all that `artifact` holds; `before` are the bytes of those before it, for the progress."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    step = min(_STEP, artifact.size)
    with os.fdopen(handle, "wb", 0), closing(Output(handle)) as output, ThreadPoolExecutor(1, "write") as other:
        buffers = cycle([memory(step) for _ in range(2)])
        writing: Future[None] | None = None  # while the next piece is read
        for offset in range(0, artifact.size, _STEP):
            ctx.check()
            data = next(buffers)[: artifact.size - offset]
            if artifact.read_into(offset, data) != len(data):
                raise ContractViolation(f"{artifact.name} ends before its {artifact.size} bytes")
            if writing:
                writing.result()
                ctx.progress.done(before + offset)
            writing = other.submit(output.write, offset, data)
        if writing:
            writing.result()
            ctx.progress.done(before + artifact.size)
    if artifact.read_at(artifact.size, 1):
        raise ContractViolation(f"{artifact.name} goes on after its {artifact.size} bytes")


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock in the block, where the file system has locks; False where another process has it."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # NFS locks no folder that is open for reading; others lock nothing
            pass
        yield True
    finally:
        os.close(handle)


def _untouched(folder: Path) -> bool:
    """Whether nothing in it has changed for `OLD` seconds."""
    paths = [folder, *(Path(place, name) for place, _, names in os.walk(folder) for name in names)]
    return all(path.lstat().st_mtime < time.time() - OLD for path in paths)


def _write_new(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(handle, data)
        os.fsync(handle)
    finally:
        os.close(handle)


def _give_name(made: Path, name: Path) -> None:
    """FileExistsError where the name is taken. Some file systems (exFAT, CIFS) know no links, but renames."""
    try:
        os.link(made, name)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        if name.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(name)) from error
        made.rename(name)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        # A file system that cannot sync a folder says so by EINVAL (some of FUSE, old CIFS). Of a file it is an error.
        if error.errno != errno.EINVAL or not stat.S_ISDIR(os.fstat(handle).st_mode):
            raise
    finally:
        os.close(handle)
