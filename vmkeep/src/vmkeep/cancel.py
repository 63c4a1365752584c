"""Stopping the backup of a VM from another process, within ten seconds, whatever its own process does.

Two are told: the process that guards the run's guest, where the hypervisor has put one beside it, and which lets the
guest go even where the owner hangs; and the owner, by SIGTERM. Without a guard only the owner can end a backup: QEMU
hangs for ever, guest and all, when a job is aborted beside a half-open NBD client, and the owner is who reads from it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from backupcore import guard, process, verdict
from backupcore.errors import (
    AccessDenied,
    BackupError,
    Busy,
    Cancelled,
    HypervisorError,
    NotFound,
    TargetUnavailable,
    sentences,
)
from backupcore.model import VM
from backupcore.small_file import read_small
from backupcore.typed import typed
from vmkeep import folders, lock, recovery
from vmkeep.attended import RELEASED
from vmkeep.catalog import runs
from vmkeep.workplace import Workplace

__all__ = ["Left", "Stopped", "cancel"]

T = TypeVar("T")

LIMIT = 7.0
"""Seconds in which all is told and waited for; what has not ended by then is named. Python's start is not in them."""
_ANSWER = 3.0  # seconds that the file system of the state folder has to answer
_TIDY = 3.0  # seconds that the owner has to tidy up at its datastore, once the guest is let go of
_RECOVERY = 1.0  # seconds that putting right what a killed run left gets in any case
_LOOK = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """A process that has not ended: `why` follows its name in a sentence; `since` is when it began, where known."""

    process: int
    name: str
    why: str
    since: datetime | None = None

    def __str__(self) -> str:
        since = f", at work since {self.since:%Y-%m-%d %H:%M:%S}," if self.since else ""
        return f"process {self.process} ({self.name}){since} {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """What was stopped: `doing` says what it was, `state` how it ended (cancelled; recorded, where it was too late).

    `seconds` is how long it took to let go. `did` is what had to be put right, where it was killed meanwhile, or was
    done by the process that guards the guest. `left` are the processes that have not ended, though the guest is let go
    of, and `next_step` what to do about them.
    """

    vm: VM
    process: int
    doing: str
    state: str
    seconds: float
    did: tuple[str, ...] = ()
    left: tuple[Left, ...] = ()
    next_step: str = ""


def cancel(place: Workplace, vm: str, *, waiting: Callable[[lock.Holder], None] = lambda holder: None) -> Stopped:
    """Stop what works on `vm` (a name or a UUID) on this host, and wait until it has let go of the VM, or for `LIMIT`.

    NotFound if nothing does. TargetUnavailable if the state folder does not answer. AccessDenied if it belongs to
    another user. Busy if the guest may still be held then.
    libvirt is not asked, unless nothing is found: a backup can be stopped while libvirt hangs.
    """
    started = time.monotonic()
    deadline = started + LIMIT
    _require_answer(place.state)
    holder = lock.holder(place.state, vm)
    if holder is None:
        found = _within(LIMIT, lambda: place.hypervisor.find(vm))
        holder = lock.holder(place.state, found.vm.uuid)  # under the name that it had when it began
        if holder is None:
            raise NotFound(f"no backup of VM {found.vm.name} is running", "What runs left behind: vmkeep recover")
    did: list[str] = []
    with _signalled(holder, waiting, did) as owner:
        released = _given_up(place.state, holder, deadline - 1, did)
        released = owner.wait(deadline, lambda: released or _marked(place.state, holder))
    seconds = time.monotonic() - started
    left: list[Left] = []
    if not owner.ended:
        left = _left(holder)
        if not owner.dying and not released:
            raise _still_held(holder, left)
    state = "cancelled"
    last = None
    try:
        last = next(iter(runs.last(place.catalog_if_any, holder.vm.uuid, 1)), None)
    except BackupError as problem:  # a state folder that is full; the guest is let go of all the same
        did.append(f"how the run ended cannot be read: {problem.message}")
    if last is not None and last.started.timestamp() >= holder.since.timestamp() - 1:
        state = last.state
    next_step = _next_step(holder, owner) if left else ""
    if state == "running" and (owner.ended or owner.dying):  # it was killed before it could let go
        more = _recovered(place, holder.vm, max(deadline - time.monotonic(), _RECOVERY), did)
        if more is not None:
            left.append(more)
            next_step = f"It goes on by itself. How it ended: {typed('vmkeep recover', holder.vm.name)}"
    if state == "running":
        state = "cancelled"
    return Stopped(
        vm=holder.vm,
        process=holder.process,
        doing=holder.doing,
        state=state,
        seconds=seconds,
        did=tuple(did),
        left=tuple(left),
        next_step=next_step,
    )


def _require_answer(state: Path) -> None:
    """TargetUnavailable where the file system of the state folder does not answer.

    A process of its own looks: who waits there can neither go on nor end, not even one thread of many.
    """
    child = os.fork()
    if not child:
        try:
            _leave_the_terminal()  # which would wait for it, too
            for path in (state / "locks").glob("vm-*"):
                with suppress(OSError):
                    read_small(path)
            for path in (state / "runs").glob("*/*"):
                path.lstat()
        finally:
            os._exit(0)
    handle = os.pidfd_open(child)
    try:
        ended = select.poll()
        ended.register(handle, select.POLLIN)
        if ended.poll(_ANSWER * 1000):
            os.waitpid(child, 0)
            return
        why = "; ".join(map(str, process.hangs([child])))
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    finally:
        os.close(handle)
    raise TargetUnavailable(
        f"the state folder {state} does not answer within {_ANSWER:.0f} s{f': {why}' if why else ''}",
        "It tells which process backs up a VM. Look to its file system; or find that process (ps -ef | grep "
        "'vmkeep.*backup') and end it with SIGTERM: the guest is let go of.",
    )


class _Owner:
    """The process that holds a VM, by a handle that cannot become another's; `ended` and `dying` as last seen."""

    def __init__(self, number: int, handle: int | None) -> None:
        self._number = number
        self._handle = handle
        self.ended = handle is None
        self.dying = False

    def wait(self, deadline: float, released: Callable[[], bool]) -> bool:
        """Wait until it has ended, or dies, or for the time; whether the guest was let go of meanwhile."""
        free = False
        while not self.ended and not self.dying and time.monotonic() < deadline:
            if not free and released():
                free = True
                deadline = min(deadline, time.monotonic() + _TIDY)
            self._look()
        return free or released()

    def _look(self) -> None:
        if self._handle is None:
            return
        # One that was killed and whose thread waits in the kernel does not count as ended here.
        ended = select.poll()
        ended.register(self._handle, select.POLLIN)
        self.ended = bool(ended.poll(_LOOK * 1000))
        self.dying = not self.ended and process.dying(self._number)
        if self.dying:  # one that is just on its way out, as most are, is waited for
            self.ended = bool(ended.poll(500))


@contextmanager
def _signalled(holder: lock.Holder, waiting: Callable[[lock.Holder], None], did: list[str]) -> Iterator[_Owner]:
    """Tell the holder to stop, where it still is that process."""
    try:
        handle = os.pidfd_open(holder.process)
    except ProcessLookupError:
        yield _Owner(holder.process, None)
        return
    try:
        # From here on the number cannot go to another process unnoticed.
        if not process.locks_are_shown():
            did.append(
                f"process {holder.process} was not told: whether it is that run cannot be seen without /proc/locks"
            )
            yield _Owner(holder.process, handle)
            return
        if not _holds(holder):
            yield _Owner(holder.process, None)
            return
        waiting(holder)
        hung = process.hang(holder.process)
        if hung is not None and hung.stopped:
            did.append(f"process {holder.process} {hung.why}; it was woken up to end")
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        signal.pidfd_send_signal(handle, signal.SIGCONT)  # one that is stopped (Ctrl-Z) would never hear of it
        yield _Owner(holder.process, handle)
    except PermissionError as error:
        raise AccessDenied(
            f"process {holder.process} ({holder.doing} of VM {holder.vm.name}) belongs to another user",
            "Cancel it as that user, or as root.",
        ) from error
    finally:
        os.close(handle)


def _holds(holder: lock.Holder) -> bool:
    handle = os.open(holder.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return holder.process in process.holders(handle)
    finally:
        os.close(handle)


def _given_up(state: Path, holder: lock.Holder, deadline: float, did: list[str]) -> bool:
    """Have whoever guards the guest let go of it; whether it is let go of."""
    error = Cancelled("cancelled", "It was stopped by vmkeep cancel.")
    free = False
    for folder in folders.of(state, holder.vm):
        try:
            answer = guard.give_up(folder, error, max(deadline - time.monotonic(), 0.5))
        except NotFound:
            # It ends when all is released; where none was ever there, nothing was given up.
            with suppress(OSError):
                free = free or verdict.given_up(folder) is not None
        except BackupError as problem:
            did.append(problem.message)
        else:
            free = free or answer.released
            did += answer.did
            if not answer.released:
                did.append(f"the guest could not be let go of yet: {sentences(answer.why, answer.hint)}")
    return free


def _marked(state: Path, holder: lock.Holder) -> bool:
    return any((folder / RELEASED).exists() for folder in folders.of(state, holder.vm))


def _left(holder: lock.Holder) -> list[Left]:
    family = [holder.process, *process.children(holder.process)]
    hangs = process.hangs(family)
    found = [
        Left(
            process=hung.process,
            name=hung.name,
            why=hung.why,
            since=holder.since if hung.process == holder.process else None,
        )
        for hung in hangs
    ]
    if not found:
        why = f"was told to stop and still tidies up ({holder.doing})"
        found.append(Left(process=holder.process, name="vmkeep", why=why, since=holder.since))
    return found


def _next_step(holder: lock.Holder, owner: _Owner) -> str:
    if owner.dying:
        return "Nothing of it runs any more, and the next backup does not wait for it. It is gone when that answers."
    return (
        f"It ends by itself, within a minute or two. To end it now: kill -9 {holder.process}; then "
        f"{typed('vmkeep recover', holder.vm.name)}"
    )


def _still_held(holder: lock.Holder, left: list[Left]) -> Busy:
    return Busy(
        f"process {holder.process} ({holder.doing} of VM {holder.vm.name}) was told to stop and has not let go of the "
        f"VM within {LIMIT:.0f} s: {'; '.join(map(str, left))}",
        f"If it must go: kill -9 {holder.process}, then {typed('vmkeep recover', holder.vm.name)}",
    )


def _recovered(place: Workplace, vm: VM, limit: float, did: list[str]) -> Left | None:
    """Put right what the killed run left, in a process of its own: a dead datastore would hold this one.

    What was done is added to `did`. The process, where it has not ended within `limit` seconds; it goes on.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _recover(place, vm, writer)
    os.close(writer)
    try:
        deadline = time.monotonic() + limit
        said = b""
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([reader], [], [], left)[0]:
                break
            piece = os.read(reader, 65536)
            if not piece:
                os.waitpid(child, 0)
                did += json.loads(said or b"[]")
                return None
            said += piece
    finally:
        os.close(reader)
    hangs = process.hangs([child, *process.children(child)])
    why = "; ".join(hung.why for hung in hangs) or "still puts right what the run left"
    return Left(process=child, name="vmkeep recover", why=why)


def _recover(place: Workplace, vm: VM, writer: int) -> None:
    """The process of a recovery; never returns."""
    try:
        _leave_the_terminal()
        try:
            did = [line for one in recovery.recover(place, vm.uuid) for line in one.did]
        except BackupError as error:
            did = [error.message]
        os.write(writer, json.dumps(did).encode())
    finally:
        os._exit(0)


def _leave_the_terminal() -> None:
    """For a process that may outlive this one."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)


def _within(seconds: float, ask: Callable[[], T]) -> T:
    """What `ask` returns or raises. HypervisorError if it has not after so many seconds: libvirt hangs."""
    answers: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(ask())
        except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
            errors.append(error)

    thread = threading.Thread(target=run, name="vmkeep-ask", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise HypervisorError(
            f"the hypervisor has not answered within {seconds:.0f} s; no run of that name holds a VM",
            "Look to libvirtd, then run it again.",
        )
    return answers[0]
