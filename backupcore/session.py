"""The one life cycle of a backup: prebackup -> backup -> record -> postbackup."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from blake3 import blake3

from backupcore import verdict
from backupcore.bundle import Bundle
from backupcore.context import Context
from backupcore.disk.nbd import ConnectionLost
from backupcore.errors import BackupError, Cancelled, ContractViolation, IncrementImpossible
from backupcore.model import Increment, Outcome, RunState, Type

if TYPE_CHECKING:
    from backupcore.datastore import Datastore
    from backupcore.model import BackupRun, LeftOut, Prepared, SourceRef, Stored

__all__ = ["Recorded", "run_backup"]

CAUSE_LIMIT = 2.0
"""Seconds; who looks after a VM's state does so more than once in that time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A backup that is complete and durable in its datastore.

    `run` is the one that was really taken: a full in a new image where the increment turned out to be impossible.
    `stored` is how many bytes the datastore grew by (None if not known), `read` how many were read from the disks.
    `warnings` are errors of the release of the guest; the backup is done all the same.
    """

    run: BackupRun
    increment: Increment
    stored: int | None
    read: int
    frozen_seconds: float
    left_out: tuple[LeftOut, ...]
    seconds: float
    warnings: tuple[str, ...] = ()


def run_backup(
    datastore: Datastore,
    run: BackupRun,
    ctx: Context,
    *,
    record: Callable[[Recorded], None],
    note: Callable[[BackupRun, Prepared], None] = lambda run, prepared: None,
    given: Callable[[SourceRef], None] = lambda source: None,
) -> Recorded:
    """Take one backup. Returns when it is recorded and the guest is released.

    `record` writes the increment down (in the catalog), after the driver has it and before the guest is released; only
    a recorded run lets older checkpoints go. `note` is told what is about to be stored, so that whoever comes after a
    process that was killed between the datastore and the record can still write it down. `given` is told the source
    that the driver gave, and raises ContractViolation where that is another backup's: then nothing that cleans up after
    this run hears of it. Where the increment is
    impossible a full in a new image is taken instead, once. The caller holds the lock of the VM, and closes `ctx`
    afterwards. Raises what went wrong, after the release.
    """
    calls = _Calls(record, note, given)
    try:
        return _attempt(datastore, run, ctx, calls)
    except IncrementImpossible as impossible:
        if run.type is Type.FULL:
            raise
        ctx.log.info("full backup of %s instead of an increment: %s", run.vm.name, impossible)
        return _attempt(datastore, run.as_full(str(impossible)), ctx, calls)


@dataclass(frozen=True, slots=True)
class _Calls:
    """What the caller of `run_backup` does on the way."""

    record: Callable[[Recorded], None]
    note: Callable[[BackupRun, Prepared], None]
    given: Callable[[SourceRef], None]


def _attempt(  # noqa: PLR0915 - the one life cycle, in its order
    datastore: Datastore, run: BackupRun, ctx: Context, calls: _Calls
) -> Recorded:
    started = time.monotonic()
    outcome = Outcome(state=RunState.FAILED)
    complete = False
    try:
        ctx.check()
        ctx.progress.phase("prepare")
        prepared = datastore.prebackup(run, ctx)
        ctx.touch()
        run = replace(run, date=prepared.date)
        calls.note(run, prepared)
        bundle = Bundle(prepared, run, ctx)
        try:
            ctx.progress.phase("backup", bundle.size)
            with ctx.on_cancel(bundle.close):  # a read that hangs in this process ends by nothing else
                stored = datastore.backup(bundle.artifacts, run, ctx)
            _require_new(stored.source, run, datastore)
            calls.given(stored.source)
            outcome = replace(outcome, stored=stored)
            bundle.check_complete()
            digest = blake3(bundle.manifest.data()).hexdigest()
        finally:
            bundle.close()
        recorded = _recorded(run, prepared, stored, bundle, digest, seconds=time.monotonic() - started)
        complete = True
        ctx.progress.phase("record")
        _claim(ctx)
        try:
            calls.record(recorded)
        except ContractViolation:  # the token became another's in the meantime: nobody may clean up by it
            complete, outcome = False, replace(outcome, stored=None)
            raise
        outcome = replace(outcome, state=RunState.RECORDED)
    except BaseException as error:
        _await_cause(error, ctx)
        ctx.release()
        ended_by = _ended_by(error, ctx)
        state = RunState.CANCELLED if isinstance(ended_by, Cancelled | KeyboardInterrupt) else RunState.FAILED
        outcome = replace(outcome, state=state, error=ended_by)
        if ended_by is error:
            raise
        raise ended_by from error
    finally:
        ctx.progress.phase("release")
        errors = datastore.postbackup(run, outcome, ctx)
        if outcome.state is not RunState.RECORDED:
            _tell(errors, run, ctx)
        if outcome.stored is not None and outcome.state is not RunState.RECORDED:
            if _is_given_up(ctx):
                _withdraw(datastore, outcome.stored, run, ctx)
            elif complete:
                ctx.unrecorded = outcome.stored.source
    return replace(
        recorded,
        seconds=time.monotonic() - started,
        warnings=tuple(error.in_full for error in errors),
    )


def _require_new(source: SourceRef, run: BackupRun, datastore: Datastore) -> None:
    if source in run.builds_on:
        raise ContractViolation(
            f"driver {datastore.kind} of datastore {datastore.name} gave token {source} a second time: it is one of "
            "those that the increment builds on",
            "Nothing is recorded. The driver may have replaced that backup: verify the image.",
        )


def _claim(ctx: Context) -> None:
    """Look whether anything speaks against recording the run; from here on nobody can give it up."""
    ctx.complete()
    if ctx.cancelled:
        with suppress(OSError):  # whoever stopped it may not have come to say so on disk
            verdict.give_up(ctx.folder, ctx.failure or Cancelled("cancelled"))
        ctx.check()
    verdict.claim(ctx.folder)  # whoever watches over the guest may have given the run up


def _recorded(
    run: BackupRun, prepared: Prepared, stored: Stored, bundle: Bundle, digest: str, *, seconds: float
) -> Recorded:
    """What is to be recorded; `digest` is that of the manifest."""
    increment = Increment(
        id=run.number,
        pid=run.number - 1 if run.type is Type.INCREMENT else -1,
        type=run.type,
        point=run.point,
        source=stored.source,
        size=bundle.size,
        date=prepared.date,
        consistency=prepared.consistency,
        reason=run.reason,
        digest=digest,
        disks=prepared.disks,
    )
    return Recorded(
        run=run,
        increment=increment,
        stored=stored.stored,
        read=bundle.bytes_read,
        frozen_seconds=prepared.frozen_seconds,
        left_out=prepared.left_out,
        seconds=seconds,
    )


def _tell(errors: Sequence[BackupError], run: BackupRun, ctx: Context) -> None:
    """Log what went wrong after a run that came to nothing, but for what `ctx` has been told that it owes."""
    for error in errors:
        if not any(error.message in line for line in ctx.owed):
            ctx.log.warning("after the backup of %s: %s", run.vm.name, error.in_full)


def _is_given_up(ctx: Context) -> bool:
    try:
        return verdict.given_up(ctx.folder) is not None
    except OSError:  # it cannot be told that it was not
        return True


def _withdraw(datastore: Datastore, stored: Stored, run: BackupRun, ctx: Context) -> None:
    """Remove what the driver had published of a run that was given up before it could be recorded.

    Only where the datastore itself says that the source is of this run's point: a driver that has given a token for the
    second time must not lose another backup by it. The run's own context says that it is cancelled, which would end
    this, too: the driver gets one of its own.
    """
    try:
        with Context(ctx.folder, log=ctx.log) as own:
            listed = [one.labels for one in datastore.sources(own) if one.source == stored.source]
            if [labels.get("point") for labels in listed] == [run.point]:
                datastore.delete([stored.source], own)
    except BackupError as error:
        ctx.owes(f"source {stored.source} of a run that was given up stays there, unused ({error.message})")


def _await_cause(error: BaseException, ctx: Context) -> None:
    """Give whoever watches over the run a moment to say why a disk is not served any more: the VM has ended, mostly."""
    if isinstance(error, ConnectionLost):
        with suppress(BackupError):
            ctx.wait(CAUSE_LIMIT)


def _ended_by(error: BaseException, ctx: Context) -> BaseException:
    """What ended the run: a watcher's error or the user's wish to stop, before what broke because of them."""
    if ctx.failure is not None:
        return ctx.failure
    if ctx.cancelled and not isinstance(error, Cancelled):
        return Cancelled("cancelled")
    return error
