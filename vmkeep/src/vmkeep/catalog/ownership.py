"""Whose catalog this is, and whose the images in it."""

from __future__ import annotations

from collections.abc import Sequence

from backupcore.errors import ConfigError, NotFound
from backupcore.model import VM, Image
from vmkeep.catalog import images
from vmkeep.catalog.database import Catalog
from vmkeep.installation import Installation

__all__ = ["carried", "owners", "settle", "take_over", "written_by"]

_PREFIX = 4  # hex digits, as of an image


def carried(catalog: Catalog) -> str:
    """The ID of the installation that has worked with this catalog last; "" where none has."""
    with catalog.reading() as connection:
        row = connection.execute("SELECT installation FROM identity").fetchone()
    return str(row["installation"]) if row is not None else ""


def settle(catalog: Catalog, own: Installation) -> None:
    """Note that this installation works with the catalog; where another one did, the catalog is a copy of that one's.

    Of a copy nothing is gone on with that its owner goes on with: open images are closed, flattens and what they have
    left to be deleted are dropped. A catalog from before installations becomes this one's, as far as its host's name
    says that it is.
    """
    query = "SELECT installation FROM identity"
    with catalog.reading() as connection:
        row = connection.execute(query).fetchone()
    if row is not None and row["installation"] == own.id:
        return
    with catalog.writing() as connection:
        row = connection.execute(query).fetchone()
        if row is None:
            connection.execute(
                "UPDATE images SET installation = ? WHERE installation IS NULL AND host = ?", (own.id, own.host)
            )
            connection.execute("UPDATE runs SET installation = ? WHERE installation IS NULL", (own.id,))
        elif row["installation"] != own.id:
            why = f"the state folder was a copy of that of installation {row['installation']}, whose image this is"
            connection.execute(
                "UPDATE images SET state = 'closed', why_closed = ?"
                " WHERE state IN ('open', 'flattening') AND installation IS NOT ?",
                (why, own.id),
            )
            connection.execute(
                "DELETE FROM flattens WHERE image IN (SELECT number FROM images WHERE installation IS NOT ?)", (own.id,)
            )
            connection.execute("DELETE FROM leftovers")
            connection.execute("DELETE FROM retired")
        connection.execute("INSERT OR REPLACE INTO identity (one, installation) VALUES (1, ?)", (own.id,))


def written_by(catalog: Catalog, datastore: str, who: str, own: Installation) -> list[Image]:
    """The images in a datastore of the installation `who`: its ID or the beginning of it, or, of backups of versions
    that knew none, its host's name.

    NotFound where there are none, with whose there are; ConfigError where `who` could be several.
    """
    others = [image for image in images.where(catalog) if image.datastore == datastore and not own.owns(image)]
    exact = [image for image in others if who == (image.installation or image.host)]
    if exact:
        return exact
    # What names a host must not be taken for the beginning of another one's ID.
    of_host = sorted({image.installation for image in others if image.installation and image.host == who})
    if of_host:
        raise ConfigError(f"{who!r:.80} is a host; its installation: {', '.join(of_host)}", "Name the installation.")
    begins = [image for image in others if len(who) >= _PREFIX and image.installation.startswith(who.lower())]
    ids = sorted({image.installation for image in begins})
    if len(ids) > 1:
        raise ConfigError(f"{who!r} could be any of the installations {', '.join(ids)}", "Give more digits.")
    if not begins:
        there = dict.fromkeys(_told(image) for image in others)
        raise NotFound(
            f"the catalog has no image of installation {who!r:.80} in {datastore}",
            f"It has images of: {', '.join(there)}." if there else f"See: vmkeep catalog rebuild {datastore}",
        )
    return begins


def owners(catalog: Catalog, vm: VM, datastore: str) -> list[str]:
    """Who has images of a VM in a datastore, for people to read."""
    found = [image for image in images.where(catalog, vm=vm.uuid) if image.datastore == datastore]
    return list(dict.fromkeys(_told(image) for image in found))


def _told(image: Image) -> str:
    if not image.installation:
        return f"host {image.host:.80}" if image.host else "nobody that is known"
    return f"{image.installation} (host {image.host:.80})" if image.host else image.installation


def take_over(catalog: Catalog, taken: Sequence[Image], own: Installation) -> None:
    """Make these images this installation's own."""
    with catalog.writing() as connection:
        connection.executemany(
            "UPDATE images SET installation = ? WHERE number = ?", [(own.id, image.number) for image in taken]
        )
