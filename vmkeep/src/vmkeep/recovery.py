"""Putting right what dead runs left: on the hypervisor, in the datastores, in the state folder, in the catalog.

Every backup does this for its own VM first, `vmkeep recover` whenever it is asked to. What is put right is found by
looking, so a second time there is nothing left to do.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from backupcore import guard, verdict
from backupcore.context import Context
from backupcore.datastore import Datastore
from backupcore.errors import BackupError, Busy, NotFound, from_os_error
from backupcore.model import VM, BackupRun, Outcome, RunState
from vmkeep import adoption, flatten, folders, lock, swap
from vmkeep.catalog import images, points, runs
from vmkeep.workplace import Workplace

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["PutRight", "follow", "put_right", "recover"]

GUARD_LIMIT = 10.0
"""Seconds that the process which guards a dead run's guest has to let it go by itself; twice that before it is done
without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PutRight:
    """What was put right of one VM, a line each, and what could not be."""

    vm: VM
    did: tuple[str, ...]
    errors: tuple[BackupError, ...] = ()


def recover(place: Workplace, vm: str | None = None) -> list[PutRight]:
    """Put right what dead runs left of `vm` (a name or a UUID), or of every VM: an entry for each VM looked at.

    A VM that is worked on just now is left alone: Busy for one that was named. NotFound for a VM that neither the
    hypervisor nor a dead run knows.
    """
    found = []
    for one in _vms(place, vm):
        try:
            with lock.vm_run(place.state, one, "a recovery"):
                found.append(_of(place, one))
        except Busy:
            if vm is not None:
                raise
    return found


def _vms(place: Workplace, vm: str | None) -> Sequence[VM]:
    left = {run.vm.uuid: run.vm for run in folders.dead_runs(place.state)}
    if vm is None:
        return list(({**left, **{found.vm.uuid: found.vm for found in place.hypervisor.vms()}}).values())
    try:
        return [place.hypervisor.find(vm).vm]
    except NotFound:
        # It was undefined since; what was read of it and kept for it is still there.
        gone = [one for one in left.values() if vm in (one.name, one.uuid)]
        if not gone:
            raise
        return gone


def _of(place: Workplace, vm: VM) -> PutRight:
    did: list[str] = []
    try:
        errors = put_right(place, vm, did)
    except BackupError as error:
        errors = [error]
    return PutRight(vm=vm, did=tuple(did), errors=tuple(errors))


def put_right(place: Workplace, vm: VM, did: list[str], other: Datastore | None = None) -> list[BackupError]:
    """Put right what dead runs left of `vm`, adding a line to `did` for each; returns what hindered it, and goes on.

    The caller holds the VM's lock. HypervisorError where the VM has run on disks of which some were restored in place.
    `other` is a datastore to go by for runs whose own is not configured any more.
    """
    _settle_swap(place, vm, did)
    errors: list[BackupError] = []
    _let_go(place, vm, did)
    for run in runs.died(place.catalog, vm.uuid):
        did.append(f"run {run[:8]}: written down as failed, its process was killed or found no room to do so")
    with _context(place, did) as ctx:
        try:
            spent = points.spent(place.catalog, vm, place.installation)
            place.hypervisor.recover(vm, spent, ctx, place.installation.id)
        except BackupError as error:
            errors.append(error)

    def release(run: BackupRun, folder: Path) -> None:
        if run.installation not in ("", place.installation.id):
            # The guest has been let go above. What the datastore holds of it is its owner's, who may be at work on it.
            did.append(f"run {run.id[:8]}: removed its folder; it is of installation {run.installation}")
            return
        with Context(folder) as ctx:
            try:
                _release(place, run, ctx, other)
            finally:
                did.extend(ctx.put_right)
        did.append(f"run {run.id[:8]}: released what it held, of VM {run.vm.name} and in datastore {run.datastore}")

    folders.sweep(place.state, vm, release, did, errors)
    _finish_flattens(place, vm, did, errors)
    return list({error.message: error for error in errors}.values())


def _finish_flattens(place: Workplace, vm: VM, did: list[str], errors: list[BackupError]) -> None:
    for image in images.where(place.catalog, vm=vm.uuid):
        if image.state != "flattening" or not place.installation.owns(image):
            continue
        try:
            flatten.finish(place, image)
        except Busy:
            continue  # it was not interrupted: it goes on
        except BackupError as error:
            errors.append(error)
        else:
            did.append(f"image {image.number}: finished a flatten that was interrupted, or undid it")


def _settle_swap(place: Workplace, vm: VM, did: list[str]) -> None:
    swaps, line = swap.settle(place.state, vm, lambda files: _held_off(place, vm, files))
    if swaps is not None:
        follow(place, swaps)
    if line:
        did.append(line)


@contextmanager
def _held_off(place: Workplace, vm: VM, files: Sequence[Path]) -> Iterator[bool]:
    with ExitStack() as stack:
        try:
            stack.enter_context(place.hypervisor.keep_closed(files))
            off = place.vm(vm).state == "off"
        except Busy:
            off = False
        yield off


def follow(place: Workplace, swaps: swap.Swaps) -> None:
    """What follows when disks were swapped: no chain of the VM goes on, and its checkpoints go. Then the journal."""
    for image in images.where(place.catalog, vm=swaps.vm.uuid):
        if image.state == "open":
            images.close(place.catalog, image, swaps.reason)
    with _context(place, []) as ctx:
        spent = points.spent(place.catalog, swaps.vm, place.installation)
        place.hypervisor.recover(swaps.vm, spent, ctx, place.installation.id)
    swap.forget(place.state, swaps)


@contextmanager
def _context(place: Workplace, did: list[str]) -> Iterator[Context]:
    with folders.own(place.state) as folder, Context(folder) as ctx:
        try:
            yield ctx
        finally:
            did.extend(ctx.put_right)


def _release(place: Workplace, run: BackupRun, ctx: Context, other: Datastore | None) -> None:
    """Release what a dead run held, in this process: `postbackup`, with the outcome that the catalog knows.

    Where its datastore is not configured any more, by way of another one: the guest must be released all the same.
    """
    store = other
    if run.datastore in place.config.datastores or store is None:
        name = run.datastore if run.datastore in place.config.datastores else next(iter(place.config.datastores), None)
        store = place.datastore(place.config.datastore(name), hypervisor=True)
    # What other chains have recorded since it died is no stray.
    run = replace(run, keep=points.kept(place.catalog, run.vm))
    written = runs.increment_of(place.catalog, run.id)
    given_up = _given_up(ctx.folder)
    if given_up is not None:
        if not written and run.datastore == store.name:
            adoption.withdraw(place, ctx.folder, given_up, store, ctx)
    elif not written and run.datastore == store.name and adoption.adopt(place, ctx.folder, store, ctx):
        written = runs.increment_of(place.catalog, run.id)
    if not written:
        runs.settle(place.catalog, run.id)
    outcome = Outcome(state=RunState.RECORDED if written else RunState.FAILED)
    if written and written[0].uuid != run.image:  # it became a full in a new image after its folder was made
        image, increment = written
        run = replace(run.as_full(increment.reason), image=image.uuid)
    errors = store.postbackup(run, outcome, ctx)
    if errors:
        raise errors[0]


def _given_up(folder: Path) -> BackupError | None:
    """Why the run of this folder was given up; None if it was not."""
    try:
        return verdict.given_up(folder)
    except OSError as error:
        # It cannot be told that it was not: what it stored stays unused, or is removed.
        return from_os_error(error, f"the run's folder {folder}")


def _let_go(place: Workplace, vm: VM, did: list[str]) -> None:
    """Wait until the processes that guard dead runs of `vm` have let its guest go, where some are still at it.

    They do so by themselves, and mark nothing: what a run had stored before it was killed is recorded. One that has not
    noticed the death is told.
    """
    for folder in folders.dead(place.state, vm):
        deadline = time.monotonic() + GUARD_LIMIT
        try:
            while guard.status(folder).phase != "released":
                if time.monotonic() > deadline:
                    did.extend(guard.give_up(folder, BackupError("its process was killed"), GUARD_LIMIT).did)
                    break
                time.sleep(0.05)
        except NotFound:
            continue  # it has let go, and ended; or there never was one
        except BackupError as error:
            did.append(error.message)
