"""Comparing a VM's disks, as they are, with what the newest increment of its chain would restore."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from backupcore import chain
from backupcore import compare as core
from backupcore.context import Progress
from backupcore.errors import BackupError, IncrementImpossible, IntegrityError, NotFound, UnsupportedOperation
from backupcore.hypervisor import VMState
from backupcore.model import BackupRun, Image
from backupcore.typed import typed
from vmkeep import backup, lock, settings, standing
from vmkeep.workplace import Workplace

__all__ = ["Compared", "compare"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What was found, disk by disk, of `image`, whose last increment has the number `increment`.

    `sample` is the share of what is said not to have changed that was compared at least.
    """

    image: Image
    increment: int
    disks: tuple[core.ComparedDisk, ...]
    sample: float

    @property
    def error(self) -> IntegrityError | None:
        """What to tell the user where a disk differs."""
        wrong = [disk for disk in self.disks if disk.differing]
        if not wrong:
            return None
        where = "; ".join(
            f"disk {disk.id} at {', '.join(f'{at} ({length} bytes)' for at, length in disk.differing[:3])}"
            f"{' and elsewhere' if len(disk.differing) > 3 else ''}"
            for disk in wrong
        )
        return IntegrityError(
            f"VM {self.image.vm.name} was written to without a trace since increment {self.increment} of image "
            f"{self.image.number}: {where}",
            "What was written there is in no backup, and would be in no increment. What writes to the disks besides "
            "the VM? Begin a new image: "
            f"{typed('vmkeep backup', self.image.vm.name, '-d', self.image.datastore, '--reset')}",
        )


def compare(
    place: Workplace,
    vm: str,
    *,
    datastore: str | None = None,
    disks: Sequence[str] = (),
    sample: float = 0.01,
    progress: Progress | None = None,
) -> Compared:
    """Read a sample of what is said not to have changed since the last backup, and compare it with the chain.

    Nothing is recorded, and no checkpoint is made. Locks and what is put right first are those of a backup. NotFound
    where there is no backup yet; UnsupportedOperation where nothing tracks what has changed since. A difference is no
    error here: see `Compared.error`.
    """
    name = place.config.datastore(datastore)
    store = place.datastore(name, hypervisor=True)
    found = place.hypervisor.find(vm)
    with ExitStack() as stack:
        stack.enter_context(lock.vm_run(place.state, found.vm, "a comparison"))
        backup.recover_first(place, found, store)
        newest = backup.newest_locked(place, found, name, stack)
        image = _comparable(found, name, newest)
        run = _run(place, found, name, image)
        ctx = stack.enter_context(place.context(progress))
        image = standing.current(place, store, image, ctx)
        known = core.due(store, image, ctx, disks=disks)
        ctx.progress.phase("prepare")
        try:
            held = stack.enter_context(place.hypervisor.unchanged(run, tuple(known), ctx))
        except IncrementImpossible as error:
            raise UnsupportedOperation(
                f"VM {found.vm.name} cannot be compared with image {image.number}: {error.message}",
                "The next backup is a full.",
            ) from error
        try:
            compared = core.compare(known, held, ctx, sample=sample)
        except BackupError as error:
            if ctx.failure is not None and ctx.failure is not error:
                raise ctx.failure from error  # a watcher's (scratch fills up), before what broke because of it
            raise
        ctx.progress.phase("release")
    return Compared(image=image, increment=image.increments[-1].id, disks=compared, sample=sample)


def _comparable(found: VMState, datastore: str, newest: Image | None) -> Image:
    if newest is None or not newest.increments:
        raise NotFound(
            f"VM {found.vm.name} has no backup in {datastore} to compare it with",
            f"Take one: {typed('vmkeep backup', found.vm.name, '-d', datastore)}",
        )
    if newest.state != "open":
        why = f" ({newest.why_closed})" if newest.why_closed else ""
        raise UnsupportedOperation(
            f"image {newest.number} of VM {found.vm.name} is {newest.state}{why}: nothing tracks what changed since",
            f"Begin a new one: {typed('vmkeep backup', found.vm.name, '-d', datastore)}",
        )
    return newest


def _run(place: Workplace, found: VMState, datastore: str, image: Image) -> BackupRun:
    own = place.hypervisor.settings(found.vm)
    values = settings.effective(own, place.config.defaults, found.vm.name)
    if values["MODE"] == "FULL" or values["INCREMENT_MODE"] == "SNAPSHOT":
        mode = "MODE=FULL" if values["MODE"] == "FULL" else "INCREMENT_MODE=SNAPSHOT"
        raise UnsupportedOperation(
            f"VM {found.vm.name} has {mode}: no bitmap tracks what changed, so none can be wrong",
            "Whether its backups are what was written: vmkeep image verify " + str(image.number),
        )
    return chain.plan(
        image,
        vm=found.vm,
        host=place.installation.host,
        datastore=datastore,
        settings={**values, "FULL_EVERY": "0"},
    )
