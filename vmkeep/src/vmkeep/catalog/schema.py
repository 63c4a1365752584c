"""The tables of the catalog. A change of these raises `VERSION` and brings a migration.

Version 2 came with flatten and retention: an image's `host` and `began`, `flattens`, `leftovers`.
Version 3: whose an image or a run is (`installation`, `identity`), the order in which they were recorded (`sequence`),
and columns that nothing fills as yet. Those are NULL, and each says below what will be in it.
Version 4: by what the place of a datastore is known (`datastores`).
"""

from __future__ import annotations

from datetime import UTC, datetime
from sqlite3 import Connection

from vmkeep.catalog.order import place

__all__ = ["VERSION", "create", "migrate"]

VERSION = 4

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
        -- The name of the host that took its backups, for people; NULL where that is not known.
        host TEXT,
        -- The date of its first full, which a flatten may have replaced.
        began VARCHAR(32),
        -- Whose it is; NULL in backups of versions that knew no installations: then the host's name counts.
        installation VARCHAR(32),
        -- Its place among the images, in the order in which they were recorded; those that a rebuild has found are put
        -- between them by their dates. Order only: numbers change when one is put in between.
        sequence INTEGER,
        -- A user's words about it, as text.
        notes TEXT,
        -- A user's tags, a JSON list of strings.
        tags TEXT,
        -- To whom it belongs, where a VM's owner at the time of the backup is known.
        owner TEXT,
        -- What keeps it from being deleted besides the pin (a dated lock of its store, an image that is served): a JSON
        -- list of objects.
        holds TEXT
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
        -- Its place in the order in which increments were recorded; NULL where a rebuild has found it.
        sequence INTEGER,
        -- What has proved that it can be restored, and when (a verify, a trial start): a JSON object.
        proof TEXT,
        -- By what the next increment tells whether each disk is the same: a JSON object, by disk the fields marked,
        -- below and probes of `backupcore.model.Disk`. NULL where nothing was noted.
        probes BLOB,
        PRIMARY KEY (image, id),
        UNIQUE (image, point)
    )
    """,
    "CREATE INDEX IF NOT EXISTS ix_increments_sequence ON increments (sequence)",
    """
    CREATE TABLE IF NOT EXISTS runs (
        id VARCHAR(32) NOT NULL PRIMARY KEY,
        -- NULL for work on a datastore as a whole.
        vm_uuid VARCHAR(36),
        vm_name TEXT,
        datastore TEXT NOT NULL,
        -- FULL or INCREMENT; NULL for a run that is no backup.
        type VARCHAR(9),
        started VARCHAR(32) NOT NULL,
        ended VARCHAR(32),
        state VARCHAR(16) NOT NULL,
        image INTEGER,
        increment INTEGER,
        error_class TEXT,
        error TEXT,
        traceback TEXT,
        -- Who took it; NULL where that is not known.
        installation VARCHAR(32),
        -- backup; flatten, verify, restore, instant and others once they are runs as well.
        kind VARCHAR(16) NOT NULL DEFAULT 'backup',
        -- How far it has come: prepare (the target, the VM), backup (the instant is fixed, data are read). A run that
        -- failed keeps the phase in which it did; NULL once it is recorded.
        phase VARCHAR(16),
        -- The ID that whoever asked for this run has given it, so that asking twice is one run.
        caller_id VARCHAR(64),
        -- The point that a backup was to store; NULL in older versions, and for a run that is no backup.
        point VARCHAR(32)
    )
    """,
    "CREATE INDEX IF NOT EXISTS ix_runs_vm_uuid ON runs (vm_uuid)",
    "CREATE UNIQUE INDEX IF NOT EXISTS one_run_per_caller_id ON runs (caller_id) WHERE caller_id IS NOT NULL",
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
    # One row: the installation that has worked with this catalog last.
    """
    CREATE TABLE IF NOT EXISTS identity (
        one INTEGER NOT NULL PRIMARY KEY CHECK (one = 1),
        installation VARCHAR(32) NOT NULL
    )
    """,
    # By what the place is known that a datastore's backups lie in, by the name that the configuration gives it. Two
    # names may mean one place.
    """
    CREATE TABLE IF NOT EXISTS datastores (
        name TEXT NOT NULL PRIMARY KEY,
        identity VARCHAR(128) NOT NULL,
        -- When it was first seen here, or a user said that this place is meant.
        since VARCHAR(32) NOT NULL
    )
    """,
)

_ADDED_IN_2 = ("host TEXT", "began VARCHAR(32)", "why_closed TEXT")
_ADDED_IN_3 = {
    "images": ("installation VARCHAR(32)", "sequence INTEGER", "notes TEXT", "tags TEXT", "owner TEXT", "holds TEXT"),
    "increments": ("sequence INTEGER", "proof TEXT", "probes BLOB"),
}


def create(connection: Connection) -> None:
    """Make the tables that are missing, and note the version, within the caller's transaction."""
    for statement in _TABLES:
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {VERSION}")


def migrate(connection: Connection, version: int, host: str) -> None:
    """Bring the tables of an older version to this one, within the caller's transaction; `host` is this host's name."""
    if version < 2:
        for column in _ADDED_IN_2:
            connection.execute(f"ALTER TABLE images ADD COLUMN {column}")
        # Until then a catalog held nothing but what it had written itself.
        connection.execute("UPDATE images SET host = ?", (host,))
    if version < 3:
        _to_3(connection)
    elif version < 4:
        connection.execute("ALTER TABLE runs ADD COLUMN point VARCHAR(32)")
    create(connection)


def _to_3(connection: Connection) -> None:
    for table, columns in _ADDED_IN_3.items():
        for column in columns:
            connection.execute(f"ALTER TABLE {table} ADD COLUMN {column}")
    # SQLite takes no NOT NULL away: the table is made anew. Its index would keep the name that the new one needs.
    connection.execute("DROP INDEX IF EXISTS ix_runs_vm_uuid")
    connection.execute("ALTER TABLE runs RENAME TO runs_of_2")
    create(connection)
    connection.execute(
        "INSERT INTO runs (id, vm_uuid, vm_name, datastore, type, started, ended, state, image, increment, error_class,"
        " error, traceback) SELECT id, vm_uuid, vm_name, datastore, type, started, ended, state, image, increment,"
        " error_class, error, traceback FROM runs_of_2 ORDER BY rowid"
    )
    connection.execute("DROP TABLE runs_of_2")
    _put_in_order(connection)


def _put_in_order(connection: Connection) -> None:
    """Number what older versions have recorded: by the runs, which are in their order; what has none, by its date."""
    runs = connection.execute(
        "SELECT image, increment FROM runs WHERE state = 'recorded' AND image IS NOT NULL ORDER BY rowid"
    ).fetchall()
    recorded = {tuple(row): at for at, row in enumerate(runs, 1)}
    connection.executemany(
        "UPDATE increments SET sequence = ? WHERE image = ? AND id = ?",
        [(at, *increment) for increment, at in recorded.items()],
    )
    # An image without a date has lost its increments.
    images = connection.execute(
        "SELECT number, coalesce(began, (SELECT min(date) FROM increments WHERE image = number), '') FROM images"
        " ORDER BY number"
    ).fetchall()
    own = {image for image, _ in recorded}
    now = datetime.now(UTC).isoformat()
    ordered = [(number, date) for number, date in images if number in own]
    found = [(number, date) for number, date in images if number not in own]
    for number, date in sorted(found, key=lambda one: (one[1], one[0])):
        ordered.insert(place([date for _, date in ordered], date, now), (number, date))
    connection.executemany(
        "UPDATE images SET sequence = ? WHERE number = ?", [(at, number) for at, (number, _) in enumerate(ordered, 1)]
    )
