"""Exit codes, and how an error is told: one line and a hint on stderr, or one JSON document there."""

from __future__ import annotations

import json
import sys

from backupcore import errors

__all__ = ["CANCELLED", "CODES", "UNEXPECTED", "USAGE", "WARNING", "code", "each_line", "one_line", "tell"]

UNEXPECTED = 1
USAGE = 2
WARNING = 3
CANCELLED = 130

LONGEST = 2000
"""Letters of a line that is shown; the longest that is not somebody's joke has a tenth of it."""

CODES: dict[type[BaseException], int] = {
    errors.BackupError: UNEXPECTED,
    errors.ContractViolation: UNEXPECTED,
    errors.ConfigError: USAGE,
    errors.NotFound: 4,
    errors.TargetUnavailable: 5,
    errors.TargetFull: 6,
    errors.AccessDenied: 7,
    errors.IntegrityError: 8,
    errors.UnsupportedOperation: 9,
    errors.Busy: 10,
    errors.HypervisorError: 11,
    errors.Cancelled: CANCELLED,
}


def code(error: BaseException) -> int:
    """The exit code of an error: that of its nearest class in the table."""
    return next((CODES[kind] for kind in type(error).__mro__ if kind in CODES), UNEXPECTED)


def one_line(text: str) -> str:
    """`text` on one line, without control characters, cut to `LONGEST` letters.

    Names in it may come from a guest's owner or a datastore.
    """
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 1]}…"
    return "".join(letter if letter.isprintable() else " " if letter.isspace() else "?" for letter in text)


def each_line(text: str) -> str:
    """The same for each line of a traceback: the texts of errors in it are a datastore's, or a driver's."""
    return "\n".join(map(one_line, text.splitlines()))


def tell(kind: str, message: str, hint: str, exit_code: int, *, as_json: bool) -> int:
    """Say on stderr what went wrong, and return the exit code."""
    if as_json:
        error = {"class": kind, "message": message[:LONGEST], "hint": hint[:LONGEST], "exit_code": exit_code}
        print(json.dumps({"error": error}), file=sys.stderr)  # noqa: T201 - the last line of stderr, for scripts
        return exit_code
    print(f"vmkeep: {one_line(message.strip())}", file=sys.stderr)  # noqa: T201 - the one place that tells of errors
    if hint:
        print(f"  {one_line(hint.strip())}", file=sys.stderr)  # noqa: T201 - as above
    return exit_code
