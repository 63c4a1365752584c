"""Documents of VMs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from vmkeep.cli.figures import iso
from vmkeep.settings import DISK_LISTS, NUMBERS, disk_list

if TYPE_CHECKING:
    from vmkeep.catalog.runs import PastRun
    from vmkeep.cli.documents.parts import Document
    from vmkeep.compare import Compared
    from vmkeep.vms import Detail, Listing

__all__ = ["compare", "config", "vm", "vms"]


def vms(found: list[Listing], now: datetime | None = None) -> list[Document]:
    """``vmkeep vm list``."""
    now = now or datetime.now(UTC)
    return [
        {
            "name": one.found.vm.name,
            "uuid": one.found.vm.uuid,
            "state": one.found.state,
            "state_reason": one.found.state_reason,
            "being_read": one.found.being_read,
            "remarks": list(one.found.remarks),
            "last_backup": iso(one.last_backup),
            "age_seconds": max(0, int((now - one.last_backup).total_seconds())) if one.last_backup else None,
        }
        for one in found
    ]


def config(detail: Detail) -> Document:
    """What counts for a VM, as in ``[defaults]``."""
    found: Document = {key.lower(): value for key, value in detail.settings.items()}
    found |= {key.lower(): int(detail.settings[key]) for key in NUMBERS}
    found["keep_chains"] = int(detail.settings["KEEP_CHAINS"]) if detail.settings["KEEP_CHAINS"] else None
    found |= {key.lower(): disk_list(detail.settings[key]) for key in DISK_LISTS}
    found["own"] = sorted(key.lower() for key in detail.own)
    return found


def vm(detail: Detail) -> Document:
    """``vmkeep vm show``."""
    return {
        "name": detail.found.vm.name,
        "uuid": detail.found.vm.uuid,
        "state": detail.found.state,
        "state_reason": detail.found.state_reason,
        "being_read": detail.found.being_read,
        "remarks": list(detail.found.remarks),
        "disks": [
            {
                "id": disk.id,
                "path": disk.path,
                "format": disk.format,
                "size": disk.virtual_size,
                "left_out": disk.left_out,
            }
            for disk in detail.found.disks
        ],
        "config": config(detail),
        "images": [one.number for one in detail.images],
        "chains": [
            {"datastore": one.datastore, "image": one.number, "last_increment": one.increments[-1].id}
            for one in detail.images
            if one.state == "open" and one.increments
        ],
        "last_runs": [_run(one) for one in detail.last_runs],
    }


def _run(run: PastRun) -> Document:
    return {
        "id": run.id,
        "kind": run.kind,
        "datastore": run.datastore,
        "type": run.type,
        "state": run.state,
        "phase": run.phase,
        "started": iso(run.started),
        "ended": iso(run.ended),
        "image": run.image,
        "increment": run.increment,
        "error": {"class": run.error_class, "message": run.error} if run.error_class else None,
    }


def compare(done: Compared) -> Document:
    """``vmkeep vm compare``."""
    return {
        "name": done.image.vm.name,
        "uuid": done.image.vm.uuid,
        "image": done.image.number,
        "increment": done.increment,
        "datastore": done.image.datastore,
        "ok": done.error is None,
        "sample": done.sample,
        "disks": [
            {
                "id": disk.id,
                "size": disk.virtual_size,
                "unchanged": disk.unchanged,
                "compared": disk.compared,
                "differing": [{"offset": offset, "length": length} for offset, length in disk.differing],
                "why_not": disk.why_not,
            }
            for disk in done.disks
        ],
    }
