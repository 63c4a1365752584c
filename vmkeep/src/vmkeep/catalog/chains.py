"""Images as retention looks at them."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import select

from backupcore.chain import Chain
from backupcore.model import VM
from vmkeep.catalog import schema
from vmkeep.catalog.database import Catalog

__all__ = ["Chains", "chains"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chains:
    """The images of one VM in one datastore, as retention looks at them."""

    vm: VM
    datastore: str
    chains: tuple[Chain, ...]


def chains(catalog: Catalog, host: str, *, vm: str | None = None, datastore: str | None = None) -> list[Chains]:
    """What there is for retention, of all VMs or of that one (UUID): without the increments' own data, so it is quick.

    `host` is this host's name; images that another one wrote are not ours.
    """
    table, rows = schema.images.c, schema.increments.c
    images = select(schema.images).order_by(table.number)
    ids = select(rows.image, rows.id).order_by(rows.image, rows.id)
    if vm is not None:
        images = images.where(table.vm_uuid == vm)
        ids = ids.where(rows.image.in_(select(table.number).where(table.vm_uuid == vm)))
    with catalog.reading() as connection:
        of_image: dict[int, list[int]] = {}
        for number, increment in connection.execute(ids):
            of_image.setdefault(number, []).append(increment)
        found: dict[tuple[str, str], tuple[VM, list[Chain]]] = {}
        for row in connection.execute(images):
            if datastore is not None and row.datastore != datastore:
                continue
            chain = Chain(
                number=row.number,
                state=row.state,
                pinned=row.pinned,
                ours=row.host == host,
                ids=tuple(of_image.get(row.number, ())),
                began=row.began or "",
            )
            known = found.setdefault((row.vm_uuid, row.datastore), (VM(uuid=row.vm_uuid, name=row.vm_name), []))
            known[1].append(chain)
    return [Chains(vm=one, datastore=key[1], chains=tuple(these)) for key, (one, these) in found.items()]
