"""The states that libvirt knows of a VM, in words, and what a backup makes of each: the one place that tells them.

libvirt's backup begins for every VM whose QEMU is there, whatever its processors do. So a guest that sleeps, that has
crashed and is preserved, or that QEMU has stopped is taken as one that is paused: its disks do not change. Those are
refused, by name, whose disks are not this host's alone just now, or soon will not be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from backupcore.errors import BackupError, Busy, HypervisorError, UnsupportedOperation
from backupcore.hypervisor import StateName
from backupcore.model import Consistency
from backupcore.typed import typed
from backupcore_libvirt.connection import IO_ERROR, OFF, PAUSED, RUNNING, SHUTTING_DOWN, Domain

__all__ = ["State", "consistency_of", "no_overlay", "refused_with_overlays", "require_here", "stopped_by_an_error"]

# libvirt's numbers that no other module needs: virDomainState, virDomainPausedReason. They are part of its ABI.
_BLOCKED, _CRASHED, _ASLEEP = 2, 6, 7
_NAMES: Mapping[int, StateName] = {
    RUNNING: "running",
    _BLOCKED: "running",
    PAUSED: "paused",
    SHUTTING_DOWN: "shutting down",
    _CRASHED: "crashed",
    _ASLEEP: "asleep",
}
_UNKNOWN, _BY_USER, _MIGRATION, _SHUTTING_DOWN, _STARTING = 0, 1, 2, 8, 11
_POSTCOPY, _POSTCOPY_FAILED = 12, 13
_REASONS: Mapping[int, str] = {
    _UNKNOWN: "",
    _BY_USER: "",
    _MIGRATION: "it is being migrated",
    3: "its memory is being saved",
    4: "its memory is being dumped",
    IO_ERROR: "after an I/O error of a disk",
    6: "by its watchdog",
    7: "since it was reverted to a snapshot",
    _SHUTTING_DOWN: "it is shutting down",
    9: "a snapshot of it is being made",
    10: "the guest has crashed",
    _STARTING: "it is starting",
    _POSTCOPY: "it was migrated to another host",
    _POSTCOPY_FAILED: "its migration to another host has failed",
    14: "after a call of libvirt that failed",
}
_ELSEWHERE = (_MIGRATION, _POSTCOPY, _POSTCOPY_FAILED)
# virDomainShutoffReason. A libvirtd that was started anew since does not know them any more.
_MIGRATED, _SAVED = 4, 5
_SINCE: Mapping[int, str] = {_MIGRATED: "it was migrated to another host", _SAVED: "its memory was saved"}
_SOON = (_SHUTTING_DOWN, _STARTING)
_NO_REASON = "for a reason that this version of vmkeep does not know"


@dataclass(frozen=True, slots=True)
class State:
    """A VM's state in words: its name, and why it is paused ("" where nobody need know)."""

    name: StateName
    why: str = ""

    @classmethod
    def of(cls, domain: Domain) -> State:
        """As it is now."""
        number, reason = domain.state()
        if number in OFF:
            return cls("saved") if domain.is_saved() else cls("off", _SINCE.get(reason, ""))
        if number == PAUSED:
            return cls("paused", _REASONS.get(reason, _NO_REASON))
        return cls(_NAMES.get(number, "other"))

    @property
    def wake_up(self) -> str:
        """The command that has such a guest go on, but for the VM's name; "" where there is none."""
        commands: Mapping[StateName, str] = {"paused": "virsh resume", "asleep": "virsh dompmwakeup"}
        return commands.get(self.name, "")

    def __str__(self) -> str:
        name = "in a state that this version of vmkeep does not know" if self.name == "other" else self.name
        return f"{name} ({self.why})" if self.why else name


def consistency_of(domain: Domain) -> Consistency:
    """What a backup of the VM as it is now has. UnsupportedOperation or Busy, by name, where there can be none."""
    require_here(domain)
    number, reason = domain.state()
    state = State.of(domain)
    if state.name == "shutting down" or (number == PAUSED and reason in _SOON):
        raise Busy(f"VM {domain.name} is {state}", "Run it again in a moment.")
    if state.name == "other" or state.why == _NO_REASON:
        raise UnsupportedOperation(
            f"VM {domain.name} is {state}, so it cannot be told whether its disks stay as they are",
            f"See: {typed('virsh domstate --reason', domain.name)}. It can be backed up while it runs, or is off.",
        )
    # What the guest of a saved VM had not yet written to its disks lies in the saved memory, also where that is a file
    # of the user's (`virsh save`), or was given up.
    if number in OFF and reason == _SAVED:
        return "crash"
    found: Mapping[StateName, Consistency] = {"running": "crash", "saved": "crash", "off": "off"}
    return found.get(state.name, "paused")


def require_here(domain: Domain) -> None:
    """UnsupportedOperation where another host may write to the VM's disks: not even a lock tells of it on a device."""
    number, reason = domain.state()
    if (number == PAUSED and reason in _ELSEWHERE) or (number in OFF and reason == _MIGRATED):
        raise UnsupportedOperation(
            f"VM {domain.name} is {State.of(domain)}: that one may write to its disks",
            "See to it on the host on which it runs. If it is to live here again: migrate it back, or start it here.",
        )


def stopped_by_an_error(domain: Domain) -> bool:
    """Whether QEMU has stopped the guest after an I/O error of a disk (a full disk, or a full scratch file)."""
    return domain.state() == (PAUSED, IO_ERROR)


def no_overlay(domain: Domain) -> str:
    """Why libvirt puts no overlay on the disks of a VM in its state, or ""; a backup job it begins all the same."""
    if State.of(domain).name != "asleep":
        return ""
    return f"the guest is asleep, and libvirt puts no overlay on its disks ({typed('virsh dompmwakeup', domain.name)})"


def refused_with_overlays(vm: str) -> BackupError:
    """The error of a VM that QEMU has stopped, and that only overlays could hold: what is waiting would go to them."""
    return HypervisorError(
        f"VM {vm}: QEMU has stopped the guest after an I/O error of one of its disks, and an overlay on each disk, by "
        "which this VM is held, would let it go on",
        f"Find the cause (a full file system? {typed('virsh domblkerror', vm)} says more), then: "
        f"{typed('virsh resume', vm)}",
    )
