"""Pure arithmetic over images: full or increment, and which increments a restore needs."""

from __future__ import annotations

from collections.abc import Mapping

from backupcore.errors import IntegrityError, NotFound
from backupcore.model import VM, BackupRun, Image, Increment, Link, Type, new_id

__all__ = ["lineage", "plan"]


def plan(
    image: Image | None,
    *,
    vm: VM,
    host: str,
    datastore: str,
    settings: Mapping[str, str],
    reset: bool = False,
) -> BackupRun:
    """The next run of `vm` in `datastore`, where `image` is its newest image there (None if it has none).

    An increment if the image is open and MODE is INCREMENT (the default); otherwise a full in a new image, with the
    reason. Whether the increment is really possible is for the hypervisor to say.
    """
    tracked = settings.get("MODE", "INCREMENT") == "INCREMENT"
    reason = _why_full(image, tracked=tracked, reset=reset)
    points = tuple(increment.point for increment in image.increments) if image else ()
    if image is None or reason:
        return BackupRun(
            id=new_id(),
            vm=vm,
            host=host,
            datastore=datastore,
            image=new_id(),
            number=0,
            point=new_id(),
            type=Type.FULL,
            reason=reason,
            spent=points,
            settings=settings,
            tracked=tracked,
        )
    last = image.increments[-1]
    return BackupRun(
        id=new_id(),
        vm=vm,
        host=host,
        datastore=datastore,
        image=image.uuid,
        number=last.id + 1,
        point=new_id(),
        type=Type.INCREMENT,
        parent=Link(point=last.point, digest=last.digest, disks=last.disks),
        builds_on=tuple(increment.source for increment in image.increments),
        spent=points[:-1],
        settings=settings,
    )


def _why_full(image: Image | None, *, tracked: bool, reset: bool) -> str:
    if image is None or not image.increments:
        return "first backup of this VM in this datastore"
    if not tracked:
        return "MODE=FULL"
    if reset:
        return "reset asked for"
    if image.state != "open":
        return image.why_closed or f"image {image.number} is {image.state}"
    return ""


def lineage(image: Image, number: int | None = None) -> tuple[Increment, ...]:
    """The increments that make up increment `number` of `image` (None: its last), oldest first; the first is a full.

    NotFound if there is no such increment; IntegrityError if the chain has a gap.
    """
    by_id = {increment.id: increment for increment in image.increments}
    wanted = image.increments[-1].id if number is None and image.increments else number
    if wanted is None or wanted not in by_id:
        ids = ", ".join(str(i) for i in by_id) or "none"
        raise NotFound(f"image {image.number} has no increment {number}", f"It has: {ids}.")
    chain = [by_id[wanted]]
    while chain[-1].type is not Type.FULL:
        parent = by_id.get(chain[-1].pid)
        if parent is None or parent.id >= chain[-1].id:
            raise IntegrityError(
                f"image {image.number}: increment {chain[-1].id} builds on {chain[-1].pid}, which is not there",
                "Restore an older increment, and start a new image with: vmkeep backup --reset",
            )
        chain.append(parent)
    return tuple(reversed(chain))
