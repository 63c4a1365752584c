"""Taking a backup: locks, the plan, the run, the record."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace

from backupcore import chain, verdict
from backupcore.context import Context, Progress
from backupcore.datastore import Datastore
from backupcore.errors import BackupError, Cancelled, ContractViolation, IncrementImpossible, sentences, text_of
from backupcore.hypervisor import VMState
from backupcore.model import VM, BackupRun, Estimate, Image, Prepared, RunState, SourceRef, Type
from backupcore.session import Recorded, run_backup
from backupcore.typed import typed
from vmkeep import (
    adoption,
    flatten,
    folders,
    full_state,
    interrupt,
    lock,
    needed,
    recovery,
    retention,
    settings,
    standing,
)
from vmkeep.attended import UnderWay, attended, end_at_once, spoilt
from vmkeep.catalog import flattens, images, ownership, points, runs, tokens
from vmkeep.catalog.database import Catalog
from vmkeep.installation import Installation
from vmkeep.taken import Taken
from vmkeep.workplace import Workplace

__all__ = ["Planned", "Taken", "newest_locked", "plan", "recover_first", "take"]

log = logging.getLogger("vmkeep.backup")


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What a backup would do: the run, the image that it would add to (None: a new one), and what it would take."""

    run: BackupRun
    image: Image | None
    estimate: Estimate


def _settings(place: Workplace, found: VMState) -> dict[str, str]:
    own = place.hypervisor.settings(found.vm)
    return settings.effective(own, place.config.defaults, found.vm.name)


def _run(
    place: Workplace,
    found: VMState,
    datastore: str,
    newest: Image | None,
    *,
    catalog: Catalog,
    own: Installation,
    reset: bool,
) -> BackupRun:
    run = chain.plan(
        newest,
        vm=found.vm,
        host=own.host,
        datastore=datastore,
        settings=_settings(place, found),
        reset=reset,
        installation=own.id,
    )
    spent = (*points.retired(catalog, found.vm), *run.spent)
    run = replace(run, spent=spent, keep=points.kept(catalog, found.vm))
    if newest is None and (owners := ownership.owners(catalog, found.vm, datastore)):
        whose = f"the backups of this VM in this datastore are those of {', '.join(owners)}"
        run = replace(run, reason=f"first backup by this installation: {whose}")
    return run


def plan(place: Workplace, vm: str, *, datastore: str | None = None, reset: bool = False) -> Planned:
    """What `take` would do now, without touching anything. Raises what it would raise before the guest is touched."""
    name = place.config.datastore(datastore)
    found = place.hypervisor.find(vm)
    own = place.installation_if_any
    newest = images.newest(place.catalog_if_any, found.vm, name, own)
    if newest and (before := flattens.begun(place.catalog_if_any, newest)):
        newest = replace(newest, state=before)  # type: ignore[arg-type]  # a state that the catalog held
    run = _run(place, found, name, newest, catalog=place.catalog_if_any, own=own, reset=reset)
    try:
        estimate = place.hypervisor.estimate(run)
    except IncrementImpossible as error:
        run = run.as_full(error.message)
        estimate = place.hypervisor.estimate(run)
    return Planned(run=run, image=newest if run.type is Type.INCREMENT else None, estimate=estimate)


def take(
    place: Workplace,
    vm: str,
    *,
    datastore: str | None = None,
    reset: bool = False,
    progress: Progress | None = None,
    remark: Callable[[str], None] = log.warning,
) -> Taken:
    """Back a VM up. Every run that gets as far as the VM's lock is written down, whatever its end.

    The work is done in a thread of its own, see `attended`; `remark` shows the user a line about a run that was stopped
    and has not ended yet.

    Errors: Busy if the VM is being backed up already; NotFound for the VM or the datastore; Cancelled after Ctrl-C or
    SIGTERM, with the guest released; else what the hypervisor or the driver raised.
    """
    name = place.config.datastore(datastore)
    under_way = UnderWay(datastore=name, remark=remark)
    return attended(
        lambda: _take(place, vm, under_way, reset=reset, progress=progress),
        lambda: _abandoned(place, under_way),
        under_way,
    )


def _take(place: Workplace, vm: str, under_way: UnderWay, *, reset: bool, progress: Progress | None) -> Taken:
    name = under_way.datastore
    store = place.datastore(name, hypervisor=True)
    found = place.hypervisor.find(vm)
    under_way.vm = found.vm
    with ExitStack() as stack:
        stack.enter_context(lock.vm_run(place.state, found.vm))
        interrupt.check()
        recover_first(place, found, store)
        shared = stack.enter_context(ExitStack())
        newest = newest_locked(place, found, name, shared)
        run = _run(place, found, name, newest, catalog=place.catalog, own=place.installation, reset=reset)
        interrupt.check()
        runs.begin(place.catalog, run)
        numbers, told = list[int](), list[str]()  # the image's number, once it is recorded; what `_held` found out
        with _written_down(place, run):
            ended: list[Context] = []  # with something stored that could not be recorded: the next run does
            folder = stack.enter_context(folders.own(place.state, run, stays=lambda: bool(ended)))
            room = stack.enter_context(full_state.room_for_the_record(folder, place.state))
            ctx = Context(folder, progress=progress)
            under_way.run, under_way.ctx = run, ctx

            def note(begun: BackupRun, prepared: Prepared) -> None:
                adoption.note(folder, begun, prepared)
                try:
                    runs.reads(place.catalog, begun.id)
                except BackupError as error:  # it is for whoever looks; the record will say what is wrong
                    log.info("how far run %s is could not be written down: %s", begun.id, error)

            def record(done: Recorded) -> None:
                room.unlink(missing_ok=True)
                _require_recordable(place, found.vm, name, ctx)
                numbers.append(runs.record(place.catalog, done, driver=store.kind))
                under_way.recorded = Taken(recorded=done, image=numbers[0])

            try:
                with interrupt.cancels(ctx), ctx:
                    held = _held(place, store, run, newest, ctx=ctx, told=told)
                    recorded = run_backup(store, held, ctx, record=record, note=note, given=_new(place, store))
            except (OSError, BackupError) as error:  # what breaks because of a closed file says anything
                _require_lock(place, found.vm)
                if ctx.unrecorded is None or not isinstance(error, BackupError):
                    raise
                ended.append(ctx)
                later = f"It is complete in datastore {name}; the next backup of {found.vm.name} records it."
                raise type(error)(
                    f"the backup could not be recorded: {error.message}", sentences(error.hint, later)
                ) from error
            finally:
                under_way.folder_goes()
                _tell(name, ctx, () if under_way.recorded else told)
        shared.close()
        under_way.recorded = Taken(recorded=recorded, image=numbers[0], warnings=recorded.warnings, found=tuple(told))
        done, warnings = retention.after(place, found.vm, name, progress=progress)
        return Taken(
            recorded=recorded,
            image=numbers[0],
            retention=tuple(action for due in done for action in due.actions),
            warnings=(*recorded.warnings, *warnings),
            found=tuple(told),
        )


def _new(place: Workplace, store: Datastore) -> Callable[[SourceRef], None]:
    """What refuses a token that was given before."""

    def check(source: SourceRef) -> None:
        # SQLite needs room to read, too; that of the record is given back only then, where this is asked once more.
        with suppress(*full_state.UNWRITABLE):
            tokens.check_new(place.catalog, store.name, store.kind, source)

    return check


def _tell(datastore: str, ctx: Context, told: Iterable[str]) -> None:
    """Log what was found out before a run that came to nothing, and what it owes."""
    for line in told:
        log.warning("%s", line)
    for line in ctx.owed:
        log.warning("datastore %s: %s", datastore, line)


def _held(
    place: Workplace, store: Datastore, run: BackupRun, newest: Image | None, *, ctx: Context, told: list[str]
) -> BackupRun:
    """The run, once the VM's images were held against the datastore: a full where an increment would build on what is
    gone, or make a second end of a chain that goes on elsewhere. What the user has to know is added to `told`.
    """
    try:
        held = standing.hold(place, store, ctx, vm=run.vm, datastore=run.datastore, newest=newest)
        forgotten = _forgotten(place, store, run, ctx) if newest is None else ""
    except BackupError as error:
        ctx.check()
        if error.retryable and run.type is Type.INCREMENT:
            raise
        # Whoever may write there need not be allowed to read; and a full needs nothing of what is there.
        log.warning("datastore %s was not held against the catalog: %s", run.datastore, error.in_full)
        return run
    told += held.warnings
    if forgotten:
        told.append(f"{forgotten}. {standing.remedy(run.datastore)}")
        return replace(run, reason=forgotten)
    if run.type is Type.INCREMENT and held.why_full:
        return run.as_full(held.why_full)
    if run.type is Type.INCREMENT and held.newest is not None:
        # Somebody may have given a source another token: a tag that was added to a snapshot does.
        return replace(run, builds_on=tuple(one.source for one in held.newest.increments))
    return run


def _forgotten(place: Workplace, store: Datastore, run: BackupRun, ctx: Context) -> str:
    """What an earlier catalog has known of the VM, in words; "" also where the datastore cannot list: it may be new."""
    try:
        return needed.forgotten(place, store, run.vm, ctx)
    except BackupError as error:
        ctx.check()
        log.info("datastore %s was not looked through for backups of before: %s", run.datastore, error.in_full)
        return ""


def _require_recordable(place: Workplace, vm: VM, datastore: str, ctx: Context) -> None:
    """That the VM is still ours, and what was stored lies where the catalog will say."""
    _require_lock(place, vm)
    place.same_place(datastore).look_before_record(ctx)


def _require_lock(place: Workplace, vm: VM) -> None:
    try:
        lock.still_held(place.state, vm)
    except ContractViolation:
        end_at_once()
        raise


def _abandoned(place: Workplace, under_way: UnderWay) -> Taken:
    """What becomes of a run that was stopped and is not waited for any longer: its thread stays where it hangs."""
    standing = under_way.standing()
    name = under_way.vm.name if under_way.vm else "the VM"
    now = typed("vmkeep recover", *([name] if under_way.vm else []))
    run, ctx = under_way.run, under_way.ctx
    if under_way.recorded is not None:
        if spoilt():
            standing = "a plugin has closed files that are not its own"
        cut_off = f"what was to follow was cut off: {standing}. Done by the next backup, or: {now}"
        return replace(under_way.recorded, warnings=(*under_way.recorded.warnings, cut_off))
    hint = (
        f"What datastore {under_way.datastore} still holds of this run is swept by the next backup of {name} to it; "
        f"the rest now: {now}"
    )
    if run is None or ctx is None:
        raise Cancelled(f"cancelled; {standing}", "No backup had begun.")
    try:
        _require_lock(place, run.vm)
    except ContractViolation as lost:
        with suppress(OSError):  # what was read or written under wrong numbers must not be adopted later
            verdict.give_up(ctx.folder, lost)
        raise
    error = ctx.failure or Cancelled("cancelled")
    try:
        late = not verdict.give_up(ctx.folder, error)
    except OSError as problem:
        log.warning("the run could not be marked as given up: %s", problem)
        late = False
    if late:
        raise type(error)(
            f"{error.message}; it was complete in datastore {under_way.datastore} by then, but is not recorded yet",
            f"The next backup of {name} records it, or now: {now}",
        )
    message = f"{error.message}; {standing}"
    _write_down(place, run, error, message)
    raise type(error)(message, sentences(error.hint, hint))


def recover_first(place: Workplace, found: VMState, store: Datastore) -> None:
    """Put right what dead runs left of this VM, which the caller has locked; what was done is logged.

    What hinders it is logged, too: the run says what hinders itself.
    """
    did: list[str] = []
    try:
        for error in recovery.put_right(place, found.vm, did, store):
            log.warning("%s", error.in_full)
    finally:
        for line in did:
            log.warning("VM %s: %s", found.vm.name, line)


def newest_locked(place: Workplace, found: VMState, datastore: str, stack: ExitStack) -> Image | None:
    """The VM's newest image, with a shared lock: it must not be deleted while an increment is added to it.

    A flatten of it that was interrupted is finished first.
    """
    newest = images.newest(place.catalog, found.vm, datastore, place.installation)
    if newest:
        flatten.finish(place, newest)
        stack.enter_context(lock.image_shared(place.state, newest))
    # It may have been deleted between the two lines above; the lock keeps what is read now.
    return images.newest(place.catalog, found.vm, datastore, place.installation)


@contextmanager
def _written_down(place: Workplace, run: BackupRun) -> Iterator[None]:
    try:
        yield
    except BackupError as error:
        _write_down(place, run, error, error.message)
        raise
    except BaseException as error:
        trace = "".join(traceback.format_exception(error))
        _write_down(place, run, error, text_of(error), trace)
        raise


def _write_down(place: Workplace, run: BackupRun, error: BaseException, message: str, trace: str = "") -> None:
    """Write down how the run ended. Where that is not possible the next run does, and `error` stays what is told."""
    if spoilt():
        # Whoever still writes to a descriptor that was closed under him would write into the catalog, once it is opened
        # under that number.
        return
    state = RunState.CANCELLED if isinstance(error, Cancelled) else RunState.FAILED
    try:
        runs.fail(place.catalog, run.id, state, kind=type(error).__name__, error=message, traceback=trace)
    except BackupError as problem:
        log.warning("how run %s ended could not be written down: %s", run.id[:8], problem.in_full)
