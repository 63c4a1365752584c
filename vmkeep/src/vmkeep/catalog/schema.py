"""The tables of the catalog. A change of these raises `VERSION` and brings a migration.

Version 2 came with flatten and retention: an image's `host` and `began`, `flattens`, `leftovers`.
"""

from __future__ import annotations

import socket
from sqlite3 import Connection

__all__ = ["VERSION", "create", "migrate"]

VERSION = 2

# Dates are ISO 8601 in UTC, as text: they sort, and a person can read them.
_TABLES = (
    """
    CREATE TABLE IF NOT EXISTS images (
        -- A number that was given once is never given again: a script may have noted it.
        number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
        uuid VARCHAR(32) NOT NULL UNIQUE,
        vm_uuid VARCHAR(36) NOT NULL,
        vm_name TEXT NOT NULL,
        datastore TEXT NOT NULL,
        state VARCHAR(16) NOT NULL,
        pinned BOOLEAN NOT NULL,
        -- Why no increment is added any more; the reason of the full that follows.
        why_closed TEXT,
        -- Who took its backups; NULL where that is not known: retention lets go only of what this host has written.
        host TEXT,
        -- The date of its first full, which a flatten may have replaced.
        began VARCHAR(32)
    )
    """,
    "CREATE INDEX IF NOT EXISTS ix_images_vm_uuid ON images (vm_uuid)",
    "CREATE UNIQUE INDEX IF NOT EXISTS one_open_image ON images (vm_uuid, datastore) WHERE state = 'open'",
    """
    CREATE TABLE IF NOT EXISTS increments (
        image INTEGER NOT NULL REFERENCES images (number),
        id INTEGER NOT NULL,
        pid INTEGER NOT NULL,
        type VARCHAR(9) NOT NULL,
        point VARCHAR(32) NOT NULL,
        source VARCHAR(128) NOT NULL,
        size INTEGER NOT NULL,
        date VARCHAR(32) NOT NULL,
        consistency VARCHAR(16) NOT NULL,
        reason TEXT NOT NULL,
        digest VARCHAR(64) NOT NULL,
        disks TEXT NOT NULL,
        stored INTEGER,
        read INTEGER NOT NULL,
        frozen_seconds FLOAT NOT NULL,
        seconds FLOAT NOT NULL,
        PRIMARY KEY (image, id),
        UNIQUE (image, point)
    )
    """,
    """
    CREATE TABLE IF NOT EXISTS runs (
        id VARCHAR(32) NOT NULL PRIMARY KEY,
        vm_uuid VARCHAR(36) NOT NULL,
        vm_name TEXT NOT NULL,
        datastore TEXT NOT NULL,
        type VARCHAR(9) NOT NULL,
        started VARCHAR(32) NOT NULL,
        ended VARCHAR(32),
        state VARCHAR(16) NOT NULL,
        image INTEGER,
        increment INTEGER,
        error_class TEXT,
        error TEXT,
        traceback TEXT
    )
    """,
    "CREATE INDEX IF NOT EXISTS ix_runs_vm_uuid ON runs (vm_uuid)",
    # Points of images that were deleted: their checkpoints may still be on the VM, and go with its next recorded run.
    """
    CREATE TABLE IF NOT EXISTS retired (
        point VARCHAR(32) NOT NULL PRIMARY KEY,
        vm_uuid VARCHAR(36) NOT NULL
    )
    """,
    "CREATE INDEX IF NOT EXISTS ix_retired_vm_uuid ON retired (vm_uuid)",
    # A flatten from its beginning to its record. What is here without a process that works on it was interrupted.
    """
    CREATE TABLE IF NOT EXISTS flattens (
        image INTEGER NOT NULL PRIMARY KEY REFERENCES images (number),
        "to" INTEGER NOT NULL,
        state VARCHAR(16) NOT NULL, -- what the image's was, and will be
        started VARCHAR(32) NOT NULL
    )
    """,
    # Sources that a flatten has replaced and that are still to be deleted, in this order.
    """
    CREATE TABLE IF NOT EXISTS leftovers (
        number INTEGER NOT NULL PRIMARY KEY,
        vm_uuid VARCHAR(36) NOT NULL,
        datastore TEXT NOT NULL,
        source VARCHAR(128) NOT NULL
    )
    """,
    "CREATE INDEX IF NOT EXISTS ix_leftovers_vm_uuid ON leftovers (vm_uuid)",
)


def create(connection: Connection) -> None:
    """Make the tables that are missing, and note the version, within the caller's transaction."""
    for statement in _TABLES:
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {VERSION}")


def migrate(connection: Connection, version: int) -> None:
    """Bring the tables of an older version to this one, within the caller's transaction."""
    create(connection)
    if version < 2:
        connection.execute("ALTER TABLE images ADD COLUMN host TEXT")
        connection.execute("ALTER TABLE images ADD COLUMN began VARCHAR(32)")
        connection.execute("ALTER TABLE images ADD COLUMN why_closed TEXT")
        # Until then a catalog held nothing but what it had written itself.
        connection.execute("UPDATE images SET host = ?", (socket.gethostname(),))
