"""What leaves a plugin's code becomes an error of the taxonomy that names the plugin and what was asked of it.

`backupcore.errors` lists what a plugin may raise. Whatever else it is, a library of the plugin that ends the program
(SystemExit) or a task of asyncio that is cancelled (CancelledError, which is no Exception) ends nothing here, and is
never taken for an answer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from backupcore.answers import checked_until
from backupcore.errors import (
    BackupError,
    Cancelled,
    ContractViolation,
    IncrementImpossible,
    Locked,
    from_os_error,
    text_of,
)

__all__ = ["translated"]

_BEFORE_THE_GUEST = ("prebackup", "what it was to do before the guest is touched")


@contextmanager
def translated(whose: str, hook: str) -> Iterator[None]:
    """In this block code of a plugin works. Errors of the taxonomy pass, an OSError becomes one of them; the rest is a
    ContractViolation that names `whose` code it is (``driver restic of datastore nas``) and the `hook`.
    """
    try:
        with _one_error_of_one_process():
            yield
    except ContractViolation as error:
        if error.hint or error.message.startswith(("driver ", "plugin ", "a plugin")):
            raise  # it says who is at fault
        said = error.message if error.message.startswith(f"{hook} ") else f"{hook}: {error.message}"
        raise ContractViolation(f"{whose}: {said}") from error
    except IncrementImpossible as error:
        if hook in _BEFORE_THE_GUEST:
            raise
        # The session would take a full for it, and the guest has been touched by now.
        raise ContractViolation(f"{whose}: {hook} raised IncrementImpossible ({error}): prebackup alone may") from error
    except BackupError as error:
        if not (isinstance(getattr(error, "message", None), str) and isinstance(getattr(error, "hint", None), str)):
            raise ContractViolation(
                f"{whose}: {hook} raised {type(error).__name__} without a message: it must call BackupError.__init__"
            ) from error
        if isinstance(error, Locked):
            try:
                error.until = checked_until(f"{hook} raised Locked until", error.until)
            except ContractViolation as wrong:
                raise ContractViolation(f"{whose}: {wrong.message}") from error
        raise
    except OSError as error:
        raise from_os_error(error, f"{whose}, {hook}") from error
    except KeyboardInterrupt as error:
        raise Cancelled("cancelled") from error
    except BaseException as error:
        raise ContractViolation(
            f"{whose}: {hook} failed with {type(error).__name__}: {text_of(error)}",
            "This is a bug of a plugin or of this program; -v shows where.",
        ) from error


@contextmanager
def _one_error_of_one_process() -> Iterator[None]:
    """A group of errors becomes one of them, and a second process ends here."""
    process = os.getpid()
    try:
        yield
    except BaseExceptionGroup as group:  # of several tasks: asyncio's TaskGroup wraps what a single one raises, too
        error = _first(group)
        raise error from error.__cause__
    finally:
        if os.getpid() != process:
            # A child that the plugin forked and did not end: there must not be two at work on one run or restore.
            os._exit(1)


def _first(group: BaseExceptionGroup) -> BaseException:
    """Of the errors in a group the one that tells most: the first of the taxonomy, else of the system, else of all."""
    errors = list(_leaves(group))
    return next((one for kind in (BackupError, OSError) for one in errors if isinstance(one, kind)), errors[0])


def _leaves(group: BaseExceptionGroup) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
