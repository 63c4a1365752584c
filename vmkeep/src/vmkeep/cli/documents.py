"""The documents of ``--json``. Their keys are stable, and listed in docs/json.md."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from backupcore.model import Image, Increment, LeftOut
from backupcore.restore import RestoredDisk
from vmkeep.backup import Planned, Taken
from vmkeep.cancel import Stopped
from vmkeep.catalog.images import Listed
from vmkeep.catalog.runs import PastRun
from vmkeep.cli.figures import iso
from vmkeep.flatten import Done
from vmkeep.in_place import Replaced
from vmkeep.rebuild import Checked, Rebuilt
from vmkeep.recovery import PutRight
from vmkeep.restore import Files
from vmkeep.retention import Action
from vmkeep.retention import Plan as RetentionPlan
from vmkeep.settings import DISK_LISTS, NUMBERS, disk_list
from vmkeep.verify import Result
from vmkeep.vms import Detail, Listing

__all__ = [
    "backup",
    "cancel",
    "checked",
    "config",
    "flatten",
    "image",
    "images",
    "plan",
    "prune",
    "rebuild",
    "recovered",
    "replaced",
    "restore",
    "verify",
    "vm",
    "vms",
]

Document = dict[str, object]


def _disks(increment: Increment) -> list[Document]:
    return [
        {"id": disk.id, "size": disk.virtual_size, "whole": disk.whole, "reason": disk.reason}
        for disk in increment.disks
    ]


def _left_out(left: tuple[LeftOut, ...]) -> list[Document]:
    return [{"id": one.id, "reason": one.reason} for one in left]


def backup(taken: Taken) -> Document:
    """``vmkeep backup``."""
    recorded, run, increment = taken.recorded, taken.recorded.run, taken.recorded.increment
    return {
        "image": taken.image,
        "image_uuid": run.image,
        "increment": increment.id,
        "type": increment.type.value,
        "parent": increment.pid if increment.pid >= 0 else None,
        "reason": increment.reason,
        "point": increment.point,
        "date": iso(increment.date),
        "source": increment.source.token,
        "vm": run.vm.name,
        "uuid": run.vm.uuid,
        "datastore": run.datastore,
        "size": increment.size,
        "stored": recorded.stored,
        "read": recorded.read,
        "consistency": increment.consistency,
        "frozen_seconds": round(recorded.frozen_seconds, 3),
        "seconds": round(recorded.seconds, 3),
        "disks": _disks(increment),
        "left_out": _left_out(recorded.left_out),
        "retention": [_action(one) for one in taken.retention],
        "warnings": list(taken.warnings),
    }


def _action(action: Action) -> Document:
    return {
        "action": action.what,
        "image": action.image,
        "to": action.to,
        "why": action.why,
        "done": action.done,
        "error": action.error or None,
    }


def prune(plans: list[RetentionPlan], warnings: list[str], *, dry_run: bool) -> Document:
    """``vmkeep image prune``."""
    return {
        "dry_run": dry_run,
        "plans": [
            {
                "vm": one.vm.name,
                "uuid": one.vm.uuid,
                "datastore": one.datastore,
                "unknown": one.unknown or None,
                "actions": [_action(action) for action in one.actions],
            }
            for one in plans
        ],
        "warnings": warnings,
    }


def flatten(done: Done) -> Document:
    """``vmkeep image flatten``."""
    return {
        "id": done.image.number,
        "image_uuid": done.image.uuid,
        "increment": done.full.id,
        "point": done.full.point,
        "source": done.full.source.token,
        "merged": [one.id for one in done.merged],
        "size": done.full.size,
        "stored": done.stored,
        "copied": done.copied,
        "seconds": round(done.seconds, 3),
        "warnings": list(done.warnings),
    }


def plan(planned: Planned) -> Document:
    """``vmkeep backup --dry-run``."""
    run, disks = planned.run, planned.estimate.disks
    known = [disk.bytes for disk in disks if disk.bytes is not None]
    return {
        "image": planned.image.number if planned.image else None,
        "increment": run.number,
        "type": run.type.value,
        "parent": run.number - 1 if run.parent else None,
        "reason": run.reason,
        "vm": run.vm.name,
        "uuid": run.vm.uuid,
        "datastore": run.datastore,
        "size": sum(known) if len(known) == len(disks) else None,
        "disks": [{"id": disk.id, "bytes": disk.bytes, "whole": disk.whole, "reason": disk.reason} for disk in disks],
        "left_out": _left_out(planned.estimate.left_out),
    }


def cancel(stopped: Stopped) -> Document:
    """``vmkeep cancel``."""
    return {
        "vm": stopped.vm.name,
        "uuid": stopped.vm.uuid,
        "process": stopped.process,
        "doing": stopped.doing,
        "state": stopped.state,
        "seconds": round(stopped.seconds, 3),
        "did": list(stopped.did),
    }


def recovered(found: list[PutRight]) -> list[Document]:
    """``vmkeep recover``: the VMs of which something was put right, or could not be."""
    return [
        {
            "vm": one.vm.name,
            "uuid": one.vm.uuid,
            "did": list(one.did),
            "errors": [
                {"class": type(error).__name__, "message": error.message, "hint": error.hint} for error in one.errors
            ],
        }
        for one in found
        if one.did or one.errors
    ]


def _image(found: Image, date: datetime | None, size: int) -> Document:
    return {
        "id": found.number,
        "image_uuid": found.uuid,
        "name": f"{found.vm.name} {iso(date) or ''}".strip(),
        "vm": found.vm.name,
        "uuid": found.vm.uuid,
        "datastore": found.datastore,
        "state": found.state,
        "date": iso(date),
        "size": size,
        "pinned": found.pinned,
    }


def image(found: Image) -> Document:
    """``vmkeep image show``."""
    date = found.increments[0].date if found.increments else None
    return {
        **_image(found, date, sum(increment.size for increment in found.increments)),
        "increments": [
            {
                "id": increment.id,
                "pid": increment.pid,
                "type": increment.type.letter,
                "point": increment.point,
                "size": increment.size,
                "date": iso(increment.date),
                "source": increment.source.token,
                "consistency": increment.consistency,
                "reason": increment.reason,
                "disks": _disks(increment),
            }
            for increment in found.increments
        ],
    }


def images(found: list[Listed]) -> list[Document]:
    """``vmkeep image list``."""
    return [_image(one.image, one.first, one.size) for one in found]


def _restored(image: Image, disk: RestoredDisk, driver: str) -> Document:
    layers = ",".join(f"{number}:{source}" for number, source in disk.layers)
    return {
        "id": disk.id,
        "path": str(disk.path),
        "size": disk.virtual_size,
        "from": f"{driver}://{image.datastore}/{layers}//{disk.artifact}",
    }


def replaced(done: Replaced, driver: str) -> Document:
    """``vmkeep restore --in-place``."""
    return {
        "vm": done.vm.name,
        "uuid": done.vm.uuid,
        "image": done.image.number,
        "increment": done.number,
        "disks": [
            {**_restored(done.image, disk, driver), "kept": str(done.kept[disk.id]) if disk.id in done.kept else None}
            for disk in done.disks
        ],
        "nvram": {"path": str(done.nvram), "kept": str(done.kept["nvram"]) if "nvram" in done.kept else None}
        if done.nvram
        else None,
    }


def restore(files: Files, driver: str) -> Document:
    """``vmkeep restore``; `driver` is the name of the datastore's driver."""
    return {
        "name": files.name,
        "xml": str(files.definition) if files.definition else None,
        "nvram": str(files.nvram) if files.nvram else None,
        "beside": [{"artifact": name, "path": str(path)} for name, path in files.beside.items()],
        "increment": files.number,
        "disks": [_restored(files.image, disk, driver) for disk in files.disks],
        "left_out": list(files.left_out),
        "uuid": files.vm.uuid if files.vm else None,
    }


def elsewhere(image: Image, number: int, disks: Sequence[RestoredDisk], driver: str, device: str | None) -> Document:
    """``vmkeep restore --device`` and ``--verify-only``."""
    return {
        "increment": number,
        "disks": [{**_restored(image, disk, driver), "path": device} for disk in disks],
    }


def verify(result: Result) -> Document:
    """``vmkeep image verify``."""
    return {
        "id": result.image.number,
        "image_uuid": result.image.uuid,
        "state": result.image.state,
        "ok": result.ok,
        "sample": result.sample,
        "increments": [
            {"id": one.increment.id, "source": one.increment.source.token, "read": one.read, "problem": one.problem}
            for one in result.increments
        ],
    }


def rebuild(done: Rebuilt) -> Document:
    """``vmkeep catalog rebuild``."""
    return {
        "datastore": done.datastore,
        "added": [
            {
                "id": one.number,
                "image_uuid": one.uuid,
                "vm": one.vm.name,
                "uuid": one.vm.uuid,
                "host": one.host,
                "increments": [increment.id for increment in one.increments],
                "date": iso(one.increments[-1].date),
            }
            for one in done.added
        ],
        "known": done.known,
        "remarks": [{"source": one.source.token, "kind": one.kind, "why": one.why} for one in done.remarks],
        "busy": list(done.busy),
    }


def checked(found: Checked) -> Document:
    """``vmkeep catalog check``."""
    return {
        "datastores": list(found.datastores),
        "missing": [
            {"datastore": one.datastore, "source": one.source.token, "what": one.what} for one in found.missing
        ],
        "unused": [
            {"datastore": one.datastore, "source": one.source.token, "labels": dict(one.labels)} for one in found.unused
        ],
        "errors": [
            {"datastore": name, "class": type(error).__name__, "message": error.message}
            for name, error in found.errors.items()
        ],
    }


def vms(found: list[Listing], now: datetime | None = None) -> list[Document]:
    """``vmkeep vm list``."""
    now = now or datetime.now(UTC)
    return [
        {
            "name": one.found.vm.name,
            "uuid": one.found.vm.uuid,
            "state": one.found.state,
            "being_read": one.found.being_read,
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
        "being_read": detail.found.being_read,
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
        "datastore": run.datastore,
        "type": run.type,
        "state": run.state,
        "started": iso(run.started),
        "ended": iso(run.ended),
        "image": run.image,
        "increment": run.increment,
        "error": {"class": run.error_class, "message": run.error} if run.error_class else None,
    }
