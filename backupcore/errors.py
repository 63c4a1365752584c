"""What can go wrong, sorted by what the caller should do about it.

::

    BackupError
    ├── ConfigError           the user mends the configuration or the command
    ├── TargetUnavailable     retryable: the datastore is away; try again later
    ├── TargetFull            make room in the place that the message names (datastore, scratch, restore folder)
    ├── AccessDenied          the credentials or permissions do not suffice
    │   └── Locked            the datastore keeps what should be deleted, by a lock or by policy; `until` says how long
    ├── NotFound              no VM, disk, image, increment or datastore of that name
    │   └── SourceNotFound    the datastore holds no complete source of that token
    ├── IntegrityError        stored bytes are not what was written: do not restore from them
    ├── UnsupportedOperation  this will not work here, now or on a second try
    │   └── IncrementImpossible   an increment cannot be taken, a full can; raised before the guest is touched
    ├── Busy                  retryable: somebody else works on the same VM or image
    ├── HypervisorError       libvirt, QEMU or the guest refused or failed
    ├── Cancelled             the user asked to stop
    └── ContractViolation     a driver or plugin broke the contract: its author mends it

A message says what happened, to what; `hint` says what to do next. Neither ever holds a secret. Drivers raise these
from one place, ``raise TargetFull(...) from error``; an `OSError` that leaves a hook is translated by the core.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Mapping
from datetime import datetime
from typing import ClassVar

__all__ = [
    "AccessDenied",
    "BackupError",
    "Busy",
    "Cancelled",
    "ConfigError",
    "ContractViolation",
    "HypervisorError",
    "IncrementImpossible",
    "IntegrityError",
    "Locked",
    "NotFound",
    "SourceNotFound",
    "TargetFull",
    "TargetUnavailable",
    "UnsupportedOperation",
    "dump_error",
    "from_os_error",
    "load_error",
    "sentences",
    "storable",
    "text_of",
]


class BackupError(Exception):
    """The root of the tree: `message` for what happened, `hint` (or "") for what to do next."""

    retryable: ClassVar[bool] = False

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = storable(message)
        self.hint = storable(hint)

    def __str__(self) -> str:
        return self.message

    @property
    def in_full(self) -> str:
        """Message and hint as one text, for a line of a log or a list."""
        return sentences(self.message, self.hint)


class ConfigError(BackupError):
    """The configuration, an option or the command line is wrong."""


class TargetUnavailable(BackupError):
    """The datastore cannot be reached; the same call may succeed later."""

    retryable = True


class TargetFull(BackupError):
    """No room left in the place that the message names."""


class AccessDenied(BackupError):
    """The credentials or permissions do not suffice."""


class Locked(AccessDenied):
    """The datastore refuses to delete: a lock, or a policy (append-only) that is as somebody wanted it.

    Nothing was deleted. `until` is when it can be, None where nobody says.
    """

    def __init__(self, message: str, hint: str = "", *, until: datetime | None = None) -> None:
        super().__init__(message, hint)
        self.until = until


class NotFound(BackupError):
    """Nothing of that name exists."""


class SourceNotFound(NotFound):
    """The datastore holds no complete source of that token."""


class IntegrityError(BackupError):
    """What was read is not what was written."""


class UnsupportedOperation(BackupError):
    """This cannot be done here; trying again does not help."""


class IncrementImpossible(UnsupportedOperation):
    """An increment cannot be taken for the reason in the message; a full in a new image can.

    A `prebackup` raises it before the guest is touched. The session then takes the full, once, and records the reason.
    """


class Busy(BackupError):
    """Somebody else works on the same VM or image."""

    retryable = True


class HypervisorError(BackupError):
    """libvirt, QEMU or the guest refused or failed."""


class Cancelled(BackupError):
    """The user asked to stop."""


class ContractViolation(BackupError):
    """A driver or plugin broke the contract of `backupcore.hookspecs`."""


LONGEST = 2000
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = "The file system is mounted read-only: mount it so that it can be written to, then run it again."
_TOO_LONG = "Choose a shorter name: most file systems take 255 bytes."
_TOO_LARGE = "A limit on the size of files, of the process (ulimit -f) or of the file system, is reached: raise it."
_DENIED = {errno.EACCES, errno.EPERM}


def from_os_error(error: OSError, what: str) -> BackupError:
    """The member of the taxonomy that an `OSError` stands for; `what` names the thing that was worked on."""
    reason = error.strerror or text_of(error) or type(error).__name__
    where = f" ({error.filename})" if isinstance(error.filename, str) else ""
    message = f"{what}: {reason}{where}"
    if error.errno in _FULL:
        hint = _TOO_LARGE if error.errno == errno.EFBIG else "Make room there, then run it again."
        return TargetFull(message, hint)
    if error.errno == errno.EROFS:
        return AccessDenied(message, _READ_ONLY)
    if error.errno == errno.ENAMETOOLONG:
        return ConfigError(message, _TOO_LONG)
    if error.errno in _DENIED:
        return AccessDenied(message, "Check the owner and the permissions of the path.")
    return TargetUnavailable(message)


def text_of(error: BaseException) -> str:
    """What an error of somebody else's says, cut to `LONGEST` letters; that it says nothing, where that fails too."""
    try:
        text = str(error)
    except BaseException as problem:  # noqa: BLE001 - its author's bug, which must not take the place of the error
        return f"(its text cannot be had: {type(problem).__name__})"
    return storable(text[:LONGEST])


def storable(text: str) -> str:
    """A text as the catalog takes it: names of files that are no UTF-8 come as surrogates, which it does not."""
    return str(text).encode(errors="backslashreplace").decode()


def sentences(message: str, hint: str) -> str:
    """What happened, and what to do next, as one text, with a full stop in between; either may be ""."""
    if not message or not hint:
        return message or hint
    return f"{message} {hint}" if message.endswith((".", "!", "?")) else f"{message}. {hint}"


def dump_error(error: BackupError) -> dict[str, str]:
    """An error as JSON can carry it, for `load_error` in another process: kind, message, hint."""
    known = next(kind for kind in type(error).__mro__ if globals().get(kind.__name__) is kind)  # a driver has its own
    until = error.until.isoformat() if isinstance(error, Locked) and error.until else ""
    return {"kind": known.__name__, "message": error.message, "hint": error.hint, **({"until": until} if until else {})}


def load_error(said: object) -> BackupError:
    """The error that `dump_error` wrote down. Where it is none of the taxonomy: Cancelled, with what can be read."""
    if not isinstance(said, Mapping):
        said = {}
    kind = globals().get(str(said.get("kind", "")))
    known = kind if isinstance(kind, type) and issubclass(kind, BackupError) else Cancelled
    message, hint = str(said.get("message", "the run was given up")), str(said.get("hint", ""))
    if known is Locked:
        with contextlib.suppress(ValueError):
            return Locked(message, hint, until=datetime.fromisoformat(str(said.get("until", ""))))
    return known(message, hint)
