"""Images as retention looks at them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime

from backupcore.chain import AHEAD, Chain
from backupcore.model import VM
from vmkeep.catalog import rows
from vmkeep.catalog.database import Catalog
from vmkeep.installation import Installation

__all__ = ["Chains", "chains"]

log = logging.getLogger("vmkeep.catalog")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chains:
    """The images of one VM in one datastore, as retention looks at them."""

    vm: VM
    datastore: str
    chains: tuple[Chain, ...]


def chains(
    catalog: Catalog, own: Installation, *, now: datetime, vm: str | None = None, datastore: str | None = None
) -> list[Chains]:
    """What there is for retention, of all VMs or of that one (UUID): without the increments' own data, so it is quick.

    Images of another installation than `own` are not ours. `now` tells which dates are ahead.
    """
    chosen = {"vm": vm, "datastore": datastore, "ahead": (now + AHEAD).astimezone(UTC).isoformat()}
    ids = """
        SELECT image, id FROM increments
        WHERE :vm IS NULL OR image IN (SELECT number FROM images WHERE vm_uuid = :vm) ORDER BY image, id
    """
    # Dates are text in UTC, all of one form, so they sort as dates do.
    dated = """
        SELECT image, max(date) FROM increments
        WHERE date > :ahead AND (:vm IS NULL OR image IN (SELECT number FROM images WHERE vm_uuid = :vm))
        GROUP BY image
    """
    images = """
        SELECT * FROM images
        WHERE (:vm IS NULL OR vm_uuid = :vm) AND (:datastore IS NULL OR datastore = :datastore) ORDER BY number
    """
    with catalog.reading() as connection:
        of_image: dict[int, list[int]] = {}
        for number, increment in connection.execute(ids, chosen):
            of_image.setdefault(number, []).append(increment)
        ahead = {number: date[:10] for number, date in connection.execute(dated, chosen)}
        found: dict[tuple[str, str], tuple[VM, list[Chain]]] = {}
        damaged = set()
        for row in connection.execute(images, chosen):
            try:
                chain = Chain(
                    number=row["number"],
                    state=rows.required(row, "state", str),
                    pinned=bool(row["pinned"]),
                    ours=own.wrote(row["installation"], row["host"]),
                    ids=tuple(of_image.get(row["number"], ())),
                    order=rows.required(row, "sequence", int) if row["sequence"] is not None else 0,
                    owner=rows.optional(row, "installation") or rows.optional(row, "host"),
                    ahead=str(ahead.get(row["number"], "")),
                )
                vm_ = VM(uuid=rows.required(row, "vm_uuid", str), name=rows.required(row, "vm_name", str))
            except ValueError as error:
                # Which are too many of its VM's cannot be told without it.
                log.warning("image %d is damaged in the catalog, so its VM's images stay: %s", row["number"], error)
                damaged.add((row["vm_uuid"], row["datastore"]))
                continue
            known = found.setdefault((row["vm_uuid"], row["datastore"]), (vm_, []))
            known[1].append(chain)
    return [
        Chains(vm=one, datastore=key[1], chains=tuple(these))
        for key, (one, these) in found.items()
        if key not in damaged
    ]
