"""Opening the catalog: one schema version, several processes at once, every commit on the disk before it returns."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, NullPool, StaticPool, create_engine, event
from sqlalchemy.exc import DBAPIError

from backupcore.errors import (
    AccessDenied,
    BackupError,
    Busy,
    IntegrityError,
    TargetFull,
    TargetUnavailable,
    UnsupportedOperation,
    from_os_error,
)
from vmkeep.catalog import schema

__all__ = ["Catalog"]

BUSY_SECONDS = 30


class Catalog:
    """An open catalog. `reading` and `writing` give a connection within one transaction each."""

    def __init__(self, engine: Engine, path: Path) -> None:
        self._engine = engine
        self._path = path

    @classmethod
    def open(cls, path: Path, *, create: bool = True) -> Catalog:
        """The catalog at `path`, made if it does not exist; with `create` false, an empty one in memory instead.

        UnsupportedOperation if a newer version wrote it; IntegrityError if it is no catalog.
        """
        if not create and not path.exists():
            engine = create_engine("sqlite://", poolclass=StaticPool)
            schema.metadata.create_all(engine)
            return cls(engine, path)
        engine = create_engine(f"sqlite:///{path}", poolclass=NullPool)
        event.listen(engine, "connect", _on_connect)
        event.listen(engine, "begin", _on_begin)
        catalog = cls(engine, path)
        with _translated(path):
            _create(path)
            catalog._check_version()
        return catalog

    def _check_version(self) -> None:
        with self.reading() as connection:
            found = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        if found > schema.VERSION:
            raise UnsupportedOperation(
                f"the catalog {self._path} has schema {found}, this version of vmkeep knows {schema.VERSION}",
                "Use the newer vmkeep that wrote it.",
            )

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that sees one state of the catalog and changes nothing."""
        with _translated(self._path), self._engine.connect() as connection:
            yield connection.execution_options(vmkeep_begin="BEGIN")

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A connection in a transaction that no other writer runs beside; committed, and on the disk, at the end."""
        with (
            _translated(self._path),
            self._engine.connect().execution_options(vmkeep_begin="BEGIN IMMEDIATE") as connection,
            connection.begin(),
        ):
            yield connection


def _on_connect(connection: Any, _record: object) -> None:
    # The module's own BEGIN comes too late (before the first write): a read before it would be of another state.
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _on_begin(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("vmkeep_begin", "BEGIN"))


def _create(path: Path) -> None:
    """Make the file and its tables if they are not there; a lock keeps two first starts apart."""
    path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        engine = create_engine(f"sqlite:///{path}", poolclass=NullPool)
        event.listen(engine, "connect", _on_connect)
        with engine.connect() as connection:
            found = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            if found >= schema.VERSION:
                return
            if found:
                _migrate(connection, found)
                return
            # A switch to WAL is refused at once beside any other connection, whatever busy_timeout says.
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            schema.metadata.create_all(connection)
            connection.exec_driver_sql(f"PRAGMA user_version = {schema.VERSION}")
            connection.exec_driver_sql("COMMIT")
        _sync_folder(path.parent)
    finally:
        os.close(lock)


def _migrate(connection: Connection, version: int) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
    schema.migrate(connection, version)
    connection.exec_driver_sql(f"PRAGMA user_version = {schema.VERSION}")
    connection.exec_driver_sql("COMMIT")


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
    except DBAPIError as error:
        raise _from_sqlite(error.orig, path) from error
    except OSError as error:
        raise from_os_error(error, f"the catalog {path}") from error


def _from_sqlite(error: BaseException | None, path: Path) -> BackupError:
    # The low byte of an extended result code is the primary one: https://sqlite.org/rescode.html
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    message = f"the catalog {path}: {error}"
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Busy(message, "Another vmkeep has held it for long; try again.")
    if code == sqlite3.SQLITE_FULL:
        return TargetFull(message, "Make room there, then run it again.")
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return AccessDenied(message, "Check the owner and the permissions of the state folder.")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_ERROR):
        return IntegrityError(message, "The backups are in the datastores, unharmed. Move the catalog away.")
    return TargetUnavailable(message)
