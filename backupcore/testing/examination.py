"""The kit without pytest: every check of a target, one after the other, and what came out."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from backupcore.errors import BackupError, ConfigError
from backupcore.testing.bench import Bench, Failed, NotApplicable
from backupcore.testing.checks import CHECKS, Check
from backupcore.testing.target import Target

__all__ = ["Result", "Verdict", "chosen", "examine", "look", "not_made", "ruled_out"]


class Verdict(StrEnum):
    """What came out of a check."""

    OK = "ok"
    FAILED = "failed"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One check of one target: `why` says what failed, or why the check does not apply."""

    check: str
    title: str
    verdict: Verdict
    why: str
    seconds: float


def chosen(names: Sequence[str]) -> tuple[Check, ...]:
    """The checks of these names, all for none. ConfigError for a name that is none."""
    known = {check.name: check for check in CHECKS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"there is no check {', '.join(unknown)}", f"The checks are: {', '.join(known)}.")
    return tuple(check for check in CHECKS if not names or check.name in names)


def examine(
    target: Target,
    *,
    checks: Sequence[Check] = CHECKS,
    heard: Callable[[Result], None] = lambda result: None,
    folder: Path | None = None,
) -> list[Result]:
    """Make the checks and return what came out; each is told to `heard` at once.

    What was kept in the target is deleted at the end. Private files go into a fresh folder below `folder` (default:
    that for temporary files), which is removed.
    """
    results = []
    with tempfile.TemporaryDirectory(prefix="backupcore-kit-", dir=folder) as place:
        bench = Bench(target, Path(place))
        try:
            with bench.listening():
                unfit = ""
                for check in checks:
                    result = not_made(check, unfit) if unfit else look(check, bench)
                    unfit = unfit or ruled_out(check, result)
                    results.append(result)
                    heard(result)
        finally:
            bench.clean_up()
    return results


def ruled_out(check: Check, result: Result) -> str:
    """Why no further check is made, or "": what all stand on has failed, and each would fail for the same cause."""
    return f"{check.name} failed, which all checks stand on" if check.base and result.verdict is Verdict.FAILED else ""


def not_made(check: Check, why: str) -> Result:
    """The result of a check that was not made."""
    return Result(check=check.name, title=check.title, verdict=Verdict.NOT_APPLICABLE, why=why, seconds=0.0)


def look(check: Check, bench: Bench) -> Result:
    """Make one check."""
    started = time.monotonic()
    verdict, why = Verdict.OK, ""
    try:
        check.function(bench)
    except NotApplicable as reason:
        verdict, why = Verdict.NOT_APPLICABLE, str(reason)
    except Failed as failed:
        verdict, why = Verdict.FAILED, str(failed)
    except BackupError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):
            raise
        bench.tell(error)
        verdict, why = Verdict.FAILED, f"{type(error).__name__}: {error.in_full}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a driver may raise anything, and the other checks go on
        bench.tell(error)
        place = traceback.extract_tb(error.__traceback__)[-1]
        verdict = Verdict.FAILED
        why = f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
    return Result(check=check.name, title=check.title, verdict=verdict, why=why, seconds=time.monotonic() - started)
