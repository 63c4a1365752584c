"""Opening the catalog: one schema version, several processes at once, every commit on the disk before it returns."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from sqlite3 import Connection

from backupcore.errors import (
    AccessDenied,
    BackupError,
    Busy,
    IntegrityError,
    TargetFull,
    TargetUnavailable,
    UnsupportedOperation,
)
from backupcore.small_file import NotAFile, require_file
from vmkeep import full_state
from vmkeep.catalog import schema

__all__ = ["Catalog"]

BUSY_SECONDS = 30

HINT = (
    "The backups are in the datastores, unharmed. Move the catalog away and make it anew from each of them: "
    "vmkeep catalog rebuild DATASTORE"
)
"""What to do where the catalog itself is damaged."""

_COPY_LIMIT = 4 << 30  # bytes; the record of a backup takes some KiB
_HEADER = b"SQLite format 3\0"
_COPIES = 5  # how often a catalog that changes meanwhile is copied anew

log = logging.getLogger("vmkeep.catalog")


class Catalog:
    """An open catalog. `reading` and `writing` give a connection within one transaction each; its rows go by name."""

    def __init__(self, path: Path, memory: Connection | None = None) -> None:
        """`memory` is an empty catalog that stands for the file, which does not exist."""
        self._path = path
        self._memory = memory

    @classmethod
    def open(cls, path: Path, *, create: bool = True) -> Catalog:
        """The catalog at `path`, made if it does not exist; with `create` false, an empty one in memory instead.

        With `create` false it is a copy in memory also where its folder is full or cannot be written to: SQLite makes
        files beside a catalog even to read it. UnsupportedOperation if a newer version wrote it; IntegrityError if it
        is no catalog.
        """
        with _translated(path):
            fresh = _is_fresh(path)
        if not create and fresh:
            memory = _connect(":memory:")
            schema.create(memory)
            return cls(path, memory)
        catalog = cls(path)
        try:
            with _translated(path):
                _create(path)
                catalog._check_version()
        except full_state.UNWRITABLE as error:
            if create:
                raise
            log.debug("the catalog is read as it lies there: %s", error)
            with _translated(path):
                catalog = cls(path, _in_memory(path))
                catalog._check_version()
        return catalog

    def _check_version(self) -> None:
        with self.reading() as connection:
            found = _version(connection)
        if found > schema.VERSION:
            raise UnsupportedOperation(
                f"the catalog {self._path} has schema {found}, this version of vmkeep knows {schema.VERSION}",
                "Use the newer vmkeep that wrote it.",
            )

    def keep(self, name: str) -> Path:
        """Copy the catalog as it is now to a file beside it, whose name says `name`; its path."""
        path = self._path.with_name(f"{self._path.stem}.{name}{self._path.suffix}")
        with _translated(path):
            _require_new(path)
            with self._connection() as connection, closing(sqlite3.connect(path)) as copy:
                connection.backup(copy)
            _sync_folder(path.parent)
        return path

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that sees one state of the catalog and changes nothing."""
        with _translated(self._path), self._connection() as connection:
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                connection.rollback()

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A connection in a transaction that no other writer runs beside; committed, and on the disk, at the end."""
        with _translated(self._path), self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                connection.rollback()
                raise

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        if self._memory is not None:
            yield self._memory
            return
        with closing(_connect(self._path)) as connection:
            yield connection


def _connect(path: Path | str) -> Connection:
    # No isolation level: the module's own BEGIN comes too late (before the first write), so that a read before it would
    # be of another state.
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        connection.row_factory = sqlite3.Row
        connection.text_factory = _text
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        connection.close()
        raise
    return connection


def _text(data: bytes) -> str | bytes:
    """A text, or, where a bit of it has flipped, its bytes: the module's error would not say of which row."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _in_memory(path: Path) -> Connection:
    """A copy of the catalog and of the log beside it, brought up to date; what a writer adds meanwhile is not in it."""
    memory = _connect(":memory:")
    try:
        with _room_for_a_copy(path), tempfile.TemporaryDirectory(prefix="vmkeep-") as folder:
            copy = Path(folder) / path.name
            _copied(path, copy)
            with closing(_connect(copy)) as found:
                found.backup(memory)
        found_version = _version(memory)
        if found_version < schema.VERSION:
            memory.execute("BEGIN")
            schema.migrate(memory, found_version, socket.gethostname()) if found_version else schema.create(memory)
            memory.execute("COMMIT")
    except BaseException:
        memory.close()
        raise
    return memory


@contextmanager
def _room_for_a_copy(path: Path) -> Iterator[None]:
    """TargetFull where the folder for temporary files has no room: the state folder is not to blame."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        if not full_state.has_no_room(Path(tempfile.gettempdir())):
            raise
        raise TargetFull(
            f"the folder for temporary files {tempfile.gettempdir()} is full: {path}, which lies where nothing can be "
            "written, is copied there to be read",
            "Make room there, or set TMPDIR to a folder that has some.",
        ) from error


def _copied(path: Path, copy: Path) -> None:
    """Both files as they were at one moment: a checkpoint between the two would leave a catalog of no moment."""
    log_of = path.with_name(f"{path.name}-wal")
    for _ in range(_COPIES):
        before = _stamps(path, log_of)
        _copy_file(path, copy)
        beside = copy.with_name(f"{copy.name}-wal")
        beside.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            _copy_file(log_of, beside)
        if _stamps(path, log_of) == before:
            return
    raise Busy(f"the catalog {path} changes while it is copied", "Another vmkeep is writing to it; try again.")


def _copy_file(path: Path, copy: Path) -> None:
    require_file(path)
    if path.stat().st_size > _COPY_LIMIT:
        raise _damaged(path, f"it has more than {_COPY_LIMIT >> 30} GiB")
    shutil.copyfile(path, copy)


def _stamps(*paths: Path) -> list[tuple[int, int, int] | None]:
    found: list[tuple[int, int, int] | None] = []
    for path in paths:
        try:
            stat = path.stat()
        except FileNotFoundError:
            found.append(None)
        else:
            found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return found


def _version(connection: Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _is_fresh(path: Path) -> bool:
    """Whether there is no catalog as yet. IntegrityError where what lies there is none, and there was one."""
    for one in (path, *(path.with_name(f"{path.name}-{beside}") for beside in ("wal", "shm"))):
        try:
            require_file(one)
        except NotAFile as error:
            raise _damaged(path, f"{one.name}: {error.strerror}") from error
    try:
        with path.open("rb") as file:
            header = file.read(len(_HEADER))
    except FileNotFoundError:
        if path.is_symlink():
            raise _damaged(path, f"it is a link to {path.readlink()}, where there is nothing") from None
        return True
    if header and header != _HEADER:
        raise _damaged(path, "the file is no database")
    if not header and _was_used(path.parent):
        raise _damaged(path, "the file is empty, and there were backups")
    return not header


def _was_used(state: Path) -> bool:
    """Whether the state folder shows that there was a catalog: its installation, or runs."""
    return any((state / name).exists() for name in ("installation", "runs"))


def _damaged(path: Path, why: str) -> IntegrityError:
    return IntegrityError(f"the catalog {path} is damaged: {why}", HINT)


def _create(path: Path) -> None:
    """Make the file with its tables if it is not there; a lock keeps two first starts apart."""
    path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    name = path.with_name(path.name + ".lock")
    require_file(name)
    lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_fresh(path):
            _make(path)
        with closing(_connect(path)) as connection:
            found = _version(connection)
            if found >= schema.VERSION:
                return
            if not found and _was_used(path.parent):
                raise _damaged(path, "it has no tables, and there were backups")
            connection.execute("BEGIN IMMEDIATE")
            if found:
                schema.migrate(connection, found, socket.gethostname())
            else:
                schema.create(connection)
            connection.execute("COMMIT")
        _sync_folder(path.parent)
    finally:
        os.close(lock)


def _make(path: Path) -> None:
    """A new catalog, which gets its name when it has its tables: one without them is never a first start's."""
    new = path.with_name(f".{path.name}.new")
    beside = ("-wal", "-shm", "-journal")
    for end in ("", *beside):
        new.with_name(new.name + end).unlink(missing_ok=True)
    os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    with closing(_connect(new)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("BEGIN IMMEDIATE")
        schema.create(connection)
        connection.execute("COMMIT")
    for end in beside:  # of one that was moved away: SQLite would put what it holds into the new one
        path.with_name(path.name + end).unlink(missing_ok=True)
    new.rename(path)
    _sync_folder(path.parent)


def _require_new(path: Path) -> None:
    """An empty file for nobody else's eyes; the one of a second within the same second is overwritten."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise _from_sqlite(error, path) from error
    except IndexError as error:  # a column that is not there by that name
        raise IntegrityError(f"the catalog {path} is damaged: {error}", HINT) from error
    except OSError as error:
        raise full_state.from_os_error(error, f"the catalog {path}", path.parent) from error


def _from_sqlite(error: sqlite3.Error, path: Path) -> BackupError:
    # The low byte of an extended result code is the primary one: https://sqlite.org/rescode.html
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    message = f"the catalog {path}: {error}"
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Busy(message, "Another vmkeep has held it for long; try again.")
    # A file that SQLite maps, which cannot grow, is an I/O error for it.
    if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and full_state.has_no_room(path.parent)):
        return full_state.full(path.parent)
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return AccessDenied(message, "Check the owner and the permissions of the state folder.")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_ERROR):
        return IntegrityError(message, HINT)
    hint = "Look at the disk below it (dmesg), and for a limit on the size of files (ulimit -f)."
    return TargetUnavailable(message, hint if code == sqlite3.SQLITE_IOERR else "")
