"""Documents of runs: a backup, what one would do, a cancel, a recovery."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmkeep.cli.documents import parts
from vmkeep.cli.figures import iso

if TYPE_CHECKING:
    from vmkeep.backup import Planned, Taken
    from vmkeep.cancel import Stopped
    from vmkeep.cli.documents.parts import Document
    from vmkeep.recovery import PutRight

__all__ = ["backup", "cancel", "plan", "recovered"]


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
        "disks": parts.disks(increment),
        "left_out": parts.left_out(recorded.left_out),
        "retention": [parts.action(one) for one in taken.retention],
        "warnings": [*taken.missed, *taken.found, *taken.warnings],
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
        "left_out": parts.left_out(planned.estimate.left_out),
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
        "ended": not stopped.left,
        "left": [
            {"process": one.process, "name": one.name, "why": one.why, "since": one.since and iso(one.since)}
            for one in stopped.left
        ],
        "next_step": stopped.next_step,
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
