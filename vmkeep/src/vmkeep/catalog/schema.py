"""The tables of the catalog. A change of these raises `VERSION` and brings a migration.

Version 2 came with flatten and retention: an image's `host` and `began`, `flattens`, `leftovers`.
"""

from __future__ import annotations

import socket

from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

__all__ = ["VERSION", "flattens", "increments", "images", "leftovers", "metadata", "migrate", "retired", "runs"]

VERSION = 2

metadata = MetaData()

# Dates are ISO 8601 in UTC, as text: they sort, and a person can read them.
images = Table(
    "images",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("uuid", String(32), nullable=False, unique=True),
    Column("vm_uuid", String(36), nullable=False, index=True),
    Column("vm_name", Text, nullable=False),
    Column("datastore", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("pinned", Boolean, nullable=False, default=False),
    # Why no increment is added any more; the reason of the full that follows.
    Column("why_closed", Text),
    # Who took its backups; NULL where that is not known: retention lets go only of what this host has written.
    Column("host", Text),
    # The date of its first full, which a flatten may have replaced.
    Column("began", String(32)),
    # A number that was given once is never given again: a script may have noted it.
    sqlite_autoincrement=True,
)
Index(
    "one_open_image",
    images.c.vm_uuid,
    images.c.datastore,
    unique=True,
    sqlite_where=text("state = 'open'"),
)

increments = Table(
    "increments",
    metadata,
    Column("image", Integer, ForeignKey("images.number"), primary_key=True),
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("pid", Integer, nullable=False),
    Column("type", String(9), nullable=False),
    Column("point", String(32), nullable=False),
    Column("source", String(128), nullable=False),
    Column("size", Integer, nullable=False),
    Column("date", String(32), nullable=False),
    Column("consistency", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("disks", Text, nullable=False),
    Column("stored", Integer),
    Column("read", Integer, nullable=False),
    Column("frozen_seconds", Float, nullable=False),
    Column("seconds", Float, nullable=False),
    UniqueConstraint("image", "point"),
)

runs = Table(
    "runs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("vm_uuid", String(36), nullable=False, index=True),
    Column("vm_name", Text, nullable=False),
    Column("datastore", Text, nullable=False),
    Column("type", String(9), nullable=False),
    Column("started", String(32), nullable=False),
    Column("ended", String(32)),
    Column("state", String(16), nullable=False),
    Column("image", Integer),
    Column("increment", Integer),
    Column("error_class", Text),
    Column("error", Text),
    Column("traceback", Text),
)

# Points of images that were deleted: their checkpoints may still be on the VM, and go with its next recorded run.
retired = Table(
    "retired",
    metadata,
    Column("point", String(32), primary_key=True),
    Column("vm_uuid", String(36), nullable=False, index=True),
)

# A flatten from its beginning to its record. What is here without a process that works on it was interrupted.
flattens = Table(
    "flattens",
    metadata,
    Column("image", Integer, ForeignKey("images.number"), primary_key=True, autoincrement=False),
    Column("to", Integer, nullable=False),
    Column("state", String(16), nullable=False),  # what the image's was, and will be
    Column("started", String(32), nullable=False),
)

# Sources that a flatten has replaced and that are still to be deleted, in this order.
leftovers = Table(
    "leftovers",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("vm_uuid", String(36), nullable=False, index=True),
    Column("datastore", Text, nullable=False),
    Column("source", String(128), nullable=False),
)


def migrate(connection: Connection, version: int) -> None:
    """Bring the tables of an older version to this one."""
    metadata.create_all(connection)  # those that are missing
    if version < 2:
        connection.exec_driver_sql("ALTER TABLE images ADD COLUMN host TEXT")
        connection.exec_driver_sql("ALTER TABLE images ADD COLUMN began VARCHAR(32)")
        connection.exec_driver_sql("ALTER TABLE images ADD COLUMN why_closed TEXT")
        # Until then a catalog held nothing but what it had written itself.
        connection.exec_driver_sql("UPDATE images SET host = ?", (socket.gethostname(),))
