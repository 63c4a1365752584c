"""A backup that was stored and never recorded, because its process was killed in between, or the catalog had no room.

The next run records it.

One whose run was given up (`backupcore.verdict`) is never recorded, however complete it is: it is removed instead.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from backupcore.datastore import Datastore
from backupcore.errors import BackupError, IntegrityError
from backupcore.model import BackupRun, Disk, Increment, Prepared, Type
from backupcore.session import Recorded
from backupcore.small_file import read_small
from vmkeep import folders
from vmkeep.catalog import images, runs
from vmkeep.workplace import Workplace

if TYPE_CHECKING:
    from backupcore.context import Context
    from backupcore.model import SourceRef
    from backupcore.survey import Found

__all__ = ["adopt", "note", "withdraw"]

log = logging.getLogger("vmkeep.adoption")

_NAME = "prepared.json"


def note(folder: Path, run: BackupRun, prepared: Prepared) -> None:
    """Keep in the run's folder what its record will need and its datastore does not hold."""
    # The run as it is taken: it may have become a full since its folder was made.
    noted = {"run": folders.dump_run(run), "disks": [asdict(disk) for disk in prepared.disks]}
    folders.keep(folder, _NAME, json.dumps(noted))


def adopt(place: Workplace, folder: Path, store: Datastore, ctx: Context) -> bool:
    """Record what the dead run of this folder had stored; True if there was such a thing and it is recorded now.

    It must be complete, and its parent the tip of its image; otherwise it stays what it is, an unused source. The
    caller holds the VM's lock. Nothing is raised: the guest of the dead run must be released in any case.
    """
    noted = _noted(folder)
    if noted is None:
        return False
    run, disks = noted
    try:
        return _adopt(place, run, disks, store, ctx)
    except BackupError as error:
        log.warning("what run %s may have stored in %s was not recorded: %s", run.id, store.name, error)
        return False


def withdraw(place: Workplace, folder: Path, why: BackupError, store: Datastore, ctx: Context) -> None:
    """Remove what a run that was given up, because of `why`, has stored all the same; the context is told.

    Nothing that the catalog knows is touched, and nothing is raised, as by `adopt`.
    """
    noted = _noted(folder)
    if noted is None:
        return
    run, _ = noted
    for source in _stored(place, run, store, ctx):
        try:
            store.delete([source], ctx)
        except BackupError as error:
            ctx.did(
                f"run {run.id[:8]} was given up ({why.message}): source {source}, which it had stored, is not recorded "
                f"and stays in datastore {store.name}, unused ({error.message})"
            )
        else:
            ctx.did(
                f"run {run.id[:8]} was given up ({why.message}): removed source {source}, which it had stored, from "
                f"datastore {store.name}"
            )


def _noted(folder: Path) -> tuple[BackupRun, tuple[Disk, ...]] | None:
    """What `note` wrote; None where the run did not come that far, or it cannot be read."""
    try:
        noted = json.loads(read_small(folder / _NAME, folders.RECORD_LIMIT))
        return folders.load_run(noted["run"]), tuple(Disk(**disk) for disk in noted["disks"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        log.warning("%s cannot be read (%s)", folder / _NAME, type(error).__name__)
        return None


def _stored(place: Workplace, run: BackupRun, store: Datastore, ctx: Context) -> list[SourceRef]:
    """The sources of this run in the datastore that the catalog does not know; none where that cannot be told."""
    known = set(images.tokens(place.catalog))
    try:
        found = store.sources(ctx)
    except BackupError as error:
        log.warning("what run %s may have stored in %s cannot be told: %s", run.id, store.name, error)
        return []
    due = {"point": run.point, "image": run.image, "type": run.type.value}
    return [
        listed.source
        for listed in found
        if listed.source.token not in known and due.items() <= dict(listed.labels).items()
    ]


def _adopt(place: Workplace, run: BackupRun, disks: tuple[Disk, ...], store: Datastore, ctx: Context) -> bool:
    from backupcore.survey import look_at  # noqa: PLC0415 - it reads manifests, which a backup does only here

    known = set(images.tokens(place.catalog))
    for listed in store.sources(ctx):
        if listed.labels.get("point") != run.point or listed.source.token in known:
            continue
        if listed.labels.get("image") != run.image or listed.labels.get("type") != run.type.value:
            continue
        recorded = _recorded(run, disks, look_at(store, listed.source, ctx))
        number = runs.record(place.catalog, recorded, driver=store.kind)
        log.warning(
            "run %s had stored increment %d of image %d, and ended before it could record that; it is recorded now",
            run.id,
            run.number,
            number,
        )
        return True
    return False


def _recorded(run: BackupRun, disks: tuple[Disk, ...], found: Found) -> Recorded:
    manifest = found.manifest
    parent = run.parent and (run.parent.point, run.parent.digest)
    held = manifest.parent and (manifest.parent.point, manifest.parent.digest)
    due = (run.vm.uuid, run.image, run.point, run.number, run.type, parent)
    if (manifest.vm.uuid, manifest.image, manifest.point, manifest.number, manifest.type, held) != due:
        raise IntegrityError(f"source {found.source} is not what run {run.id} was to store")
    increment = Increment(
        id=run.number,
        pid=run.number - 1 if run.type is Type.INCREMENT else -1,
        type=run.type,
        point=run.point,
        source=found.source,
        size=found.size,
        date=run.date or found.date,
        consistency=manifest.consistency,
        reason=run.reason,
        digest=found.digest,
        disks=disks,
    )
    return Recorded(
        run=replace(run, date=increment.date),
        increment=increment,
        stored=None,
        read=0,
        frozen_seconds=manifest.frozen_seconds,
        left_out=(),
        seconds=0.0,
    )
