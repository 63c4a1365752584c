"""Bringing the guest to rest for the one call that fixes an instant: FS_FREEZE=AGENT or SUSPEND.

AGENT asks QEMU's guest agent to freeze the file systems, so that what is on the disks is whole; SUSPEND stops the
processors. Whatever can fail or wait is looked at before (`plan`). While the guest stands still, two things see to it
that it goes on: the process that guards the run (`backupcore_libvirt.release`) and a record on disk (`freeze_record`).

Agent commands carry their own time limit. (libvirt's setting for all of them, virDomainAgentSetResponseTimeout, cannot
be read, so a run that changed it could not put it back.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from backupcore.errors import BackupError, Busy, HypervisorError, NotFound, UnsupportedOperation, sentences
from backupcore.typed import typed
from backupcore_libvirt import freeze_record
from backupcore_libvirt.apparmor import is_confined
from backupcore_libvirt.connection import AGENT_UNRESPONSIVE, PAUSED, PAUSED_BY_USER, RUNNING, Domain
from backupcore_libvirt.folder import RunFolder, dead_folders
from backupcore_libvirt.freeze_record import FreezeRecord, How
from backupcore_libvirt.libvirt_errors import code_of, is_away
from backupcore_libvirt.xml import parse

if TYPE_CHECKING:  # the process that guards a run loads this, and needs no more than `release`
    from backupcore.context import Context
    from backupcore.model import Consistency
    from backupcore_libvirt.release.guard import Guard
    from backupcore_libvirt.states import State

__all__ = ["Freeze", "Held", "frozen", "plan", "release", "release_dead"]

ANSWER_LIMIT = 5  # seconds for a question to the agent
RELEASE_LIMIT = 60.0  # after a freeze that failed; then the guard goes on trying
DEAD_LIMIT = 15.0  # for what another run has left
AGAIN = 0.2
NO_ANSWER = {AGENT_UNRESPONSIVE, 112}
"""libvirt's codes for a command that the agent may have been sent, and may yet carry out. 112 is
VIR_ERR_AGENT_COMMAND_TIMEOUT of libvirt 11.2 and later, which older bindings have no name for."""

FREEZE, THAW, STATUS = "guest-fsfreeze-freeze", "guest-fsfreeze-thaw", "guest-fsfreeze-status"
_CONSISTENCY: Mapping[How, Consistency] = {"AGENT": "filesystem", "SUSPEND": "paused"}


@dataclass(frozen=True, slots=True)
class Freeze:
    """What is to be done with the guest: `how` is None for nothing, `otherwise` the consistency that then holds.

    `fallback` says whether the backup goes on where the freeze fails, `limit` how many seconds the guest may stand
    still. `gave_up` is why a freeze that the settings ask for is not even tried, or "".
    """

    how: How | None
    otherwise: Consistency
    fallback: bool = False
    limit: float = 10.0
    gave_up: str = ""


@dataclass(slots=True)
class Held:
    """What came of it, known when the block is over: the consistency that was reached, how long the guest stood."""

    consistency: Consistency
    seconds: float = 0.0


def plan(domain: Domain, xml: str, settings: Mapping[str, str], otherwise: Consistency, state: State | None) -> Freeze:
    """What the settings ask for, once it is clear that it can be done now.

    `state` is the VM's as it is, None for one that is off, and `otherwise` the consistency that it gives.

    UnsupportedOperation or HypervisorError where it cannot, unless FS_FREEZE_FALLBACK=YES. Changes nothing.
    """
    if state is None:  # off, or saved: it stands still
        return Freeze(None, otherwise)
    how = settings.get("FS_FREEZE", "NONE")
    fallback = settings.get("FS_FREEZE_FALLBACK", "NO") == "YES"
    limit = float(settings.get("FREEZE_TIMEOUT", "10"))
    if how == "SUSPEND":
        # One that stands still already stays so: it is not ours to resume.
        return Freeze("SUSPEND" if otherwise == "crash" else None, otherwise, fallback, limit)
    if how != "AGENT":
        return Freeze(None, otherwise)
    try:
        _require_agent(domain, xml, state, stands=otherwise == "paused")
    except (UnsupportedOperation, HypervisorError) as error:
        if not fallback:
            raise
        return Freeze(None, otherwise, gave_up=error.message)
    return Freeze("AGENT", otherwise, fallback, limit)


def _require_agent(domain: Domain, xml: str, state: State, *, stands: bool) -> None:
    other = f"Or choose another way: {typed('vmkeep vm updateconf', domain.name)} --fs-freeze SUSPEND (or NONE)"
    if stands:
        go_on = f"Let it run: {typed(state.wake_up, domain.name)}. " if state.wake_up else ""
        raise UnsupportedOperation(
            f"VM {domain.name} is {state}, so its agent cannot freeze its file systems (FS_FREEZE=AGENT)",
            f"{go_on}{other}",
        )
    channel = parse(xml).find("./devices/channel/target[@name='org.qemu.guest_agent.0']")
    if channel is None:
        raise UnsupportedOperation(
            f"VM {domain.name} has no channel for a guest agent, which FS_FREEZE=AGENT needs",
            f"Add a <channel> with the target org.qemu.guest_agent.0, and qemu-guest-agent in the guest. {other}",
        )
    if channel.get("state") == "disconnected":
        raise HypervisorError(
            f"VM {domain.name}: no guest agent is connected, which FS_FREEZE=AGENT needs",
            f"Is qemu-guest-agent installed and running in the guest? {other}",
        )
    try:
        status = domain.agent(STATUS, ANSWER_LIMIT)
    except HypervisorError as error:
        if code_of(error) in NO_ANSWER:
            raise HypervisorError(f"{error.message} (FS_FREEZE=AGENT)", f"Restart it in the guest. {other}") from error
        raise HypervisorError(
            f"{error.message} (FS_FREEZE=AGENT)", f"Does the guest's agent allow guest-fsfreeze-*? {other}"
        ) from error
    if status != "thawed":
        raise HypervisorError(
            f"VM {domain.name}: somebody else has frozen its file systems (the agent says {status!r:.40})",
            f"Wait until they are thawed; if nobody will do that: {typed('virsh domfsthaw', domain.name)}",
        )


@contextmanager
def frozen(domain: Domain, folder: RunFolder, freeze: Freeze, guard: Guard, ctx: Context) -> Iterator[Held]:
    """Let the guest stand still during the block, which makes one call and nothing else.

    HypervisorError if the guest could not be brought to rest, or did not stay so until the block's end; with
    FS_FREEZE_FALLBACK=YES a warning, and the consistency says what was reached. However the block ends, the guest goes
    on; where that cannot be seen, the guard goes on trying, and then the record is left to the next run.
    """
    held = Held(freeze.otherwise)
    if freeze.gave_up:
        ctx.log.warning("%s; the backup goes on without it (FS_FREEZE_FALLBACK=YES)", freeze.gave_up)
    if freeze.how is None:
        yield held
        return
    at_rest = False
    _require_free(domain)
    ctx.check()
    freeze_record.write(folder, FreezeRecord.now(freeze.how, domain.uuid, domain.number()))
    guard.freezing(freeze.limit)
    started = time.monotonic()
    try:
        problem = _rest(domain, folder, freeze)
        at_rest = problem is None
        if at_rest:
            yield held
    finally:
        try:
            stayed = release(domain, folder, RELEASE_LIMIT)
        except BackupError as error:
            stayed = False
            ctx.log.warning("%s", error.in_full)
        else:
            guard.thawed()
        held.seconds = time.monotonic() - started
    if at_rest and not stayed:
        problem = HypervisorError(
            f"VM {domain.name}: the guest did not stand still until its disks were held; it may do so for "
            f"{freeze.limit:.0f} s at most (FREEZE_TIMEOUT)",
            sentences(_hint_of_time(domain), _hint(domain)),
        )
    if problem is None:
        held.consistency = _CONSISTENCY[freeze.how]
        return
    if not freeze.fallback:
        raise problem
    ctx.log.warning("%s; the backup goes on without it (FS_FREEZE_FALLBACK=YES)", problem.message)
    if not at_rest:
        yield held


def _require_free(domain: Domain) -> None:
    """That nothing began meanwhile that would make libvirt wait, with the guest frozen; 30 s for a job."""
    if domain.job_type():
        raise Busy(f"VM {domain.name}: another job has just begun", "See 'virsh domjobinfo', then run it again.")
    if domain.state()[0] != RUNNING:
        raise HypervisorError(f"VM {domain.name} has just been paused or switched off", "Run it again.")


def _rest(domain: Domain, folder: RunFolder, freeze: Freeze) -> HypervisorError | None:
    """Bring the guest to rest; why that failed, or None. The record stays only where what we asked may take hold yet.

    An agent that refuses has frozen nothing (QEMU's thaws again what it had). It refuses where somebody else has frozen
    the guest since it was looked at, which is not ours to thaw, and says so in words that change: "is in frozen state"
    once, "has been disabled: the command is not allowed" since QEMU 9.1.
    """
    try:
        if freeze.how == "SUSPEND":
            domain.suspend()
            return None
        count = domain.agent(FREEZE, math.ceil(freeze.limit))
    except BackupError as error:
        if freeze.how == "AGENT" and code_of(error) not in NO_ANSWER and not is_away(error):
            freeze_record.remove(folder)
        return HypervisorError(f"the guest could not be brought to rest: {error.message}", _hint(domain))
    if not count:
        return HypervisorError(f"VM {domain.name}: its agent found no file system to freeze", _hint(domain))
    return None


def _hint_of_time(domain: Domain) -> str:
    """What a longer FREEZE_TIMEOUT would help against, or ""."""
    try:
        definition = parse(domain.live_xml())
    except BackupError:  # it has ended meanwhile
        return ""
    disks = len(definition.findall("./devices/disk[@device='disk']"))
    if not is_confined(definition) or disks < 2:
        return ""
    return (
        f"AppArmor confines this VM: libvirt compiles its profile anew for each of its {disks} disks while the guest "
        f"stands still. Give it more time: {typed('vmkeep vm updateconf', domain.name)} --freeze-timeout SECONDS"
    )


def _hint(domain: Domain) -> str:
    return (
        "Look at the agent's log in the guest: a slow disk, a freeze hook? To back up all the same: "
        f"{typed('vmkeep vm updateconf', domain.name)} --fs-freeze-fallback YES"
    )


def release(domain: Domain, folder: RunFolder, limit: float) -> bool:
    """Let the guest go on where the record in the folder says that we have brought it to rest; then the record goes.

    True if the guest was found at rest. A freeze that timed out may take hold later, so the agent is asked until it
    says that all is thawed; HypervisorError if it does not within `limit` seconds: the record then stays.
    """
    record = freeze_record.read(folder)
    if record is None or record.vm != domain.uuid:
        return False
    if not _runs(domain):
        if _is_saved(domain):
            raise HypervisorError(
                f"VM {domain.name} was saved while a backup held its guest at rest",
                "Start it; the next backup then lets the guest go on.",
            )
        at_rest = False
    else:
        at_rest = _let_go(domain, record, time.monotonic() + limit)
    freeze_record.remove(folder)
    return at_rest


def _let_go(domain: Domain, record: FreezeRecord, deadline: float) -> bool:
    at_rest = False
    while True:
        why = "it was told to go on, and does not"
        try:
            if _goes_on(domain, record):
                return at_rest
            again = at_rest
            at_rest = True
            if record.how == "AGENT":
                domain.agent(THAW, ANSWER_LIMIT)
            else:
                domain.resume()
            if not again:
                continue  # see at once that it has gone on
        except BackupError as error:
            if not _runs(domain):
                return False
            why = error.message
        if time.monotonic() > deadline:
            raise _stuck(domain, record.how, why)
        time.sleep(AGAIN)


def _runs(domain: Domain) -> bool:
    try:
        return domain.is_active()
    except NotFound:  # a transient VM that has ended
        return False


def _is_saved(domain: Domain) -> bool:
    try:
        return domain.is_saved()
    except NotFound:
        return False


def _goes_on(domain: Domain, record: FreezeRecord) -> bool:
    if record.how == "AGENT":
        # The agent works off one command after the other: this answer comes after a freeze that is under way.
        status = domain.agent(STATUS, ANSWER_LIMIT)
        if status not in ("thawed", "frozen"):  # no word that we know: then it is not ours to thaw
            raise HypervisorError(f"its agent says {status!r:.40}")
        return bool(status == "thawed")
    if domain.state() != (PAUSED, PAUSED_BY_USER):
        return True
    # Started anew since, and paused: by somebody else.
    return FreezeRecord.now("SUSPEND", domain.uuid, domain.number()) != record


def _stuck(domain: Domain, how: How, why: str) -> HypervisorError:
    if how == "SUSPEND":
        return HypervisorError(
            f"VM {domain.name} may still be suspended: {why}", f"See to it: {typed('virsh resume', domain.name)}"
        )
    return HypervisorError(
        f"the file systems of VM {domain.name} may still be frozen: {why}",
        f"As soon as the agent answers: {typed('virsh domfsthaw', domain.name)} (the next backup tries it, too).",
    )


def release_dead(domain: Domain, scratch: Path, ctx: Context) -> list[BackupError]:
    """Let the guest go on where a dead run of this VM has left it at rest; says so, and returns what hindered it."""
    errors = []
    for folder in dead_folders(scratch, domain.uuid):
        try:
            if release(domain, folder, DEAD_LIMIT):
                ctx.did(f"let the guest go on, which a dead run ({folder.run}) had left at rest")
        except BackupError as error:
            errors.append(error)
    return errors
