"""What a datastore is known by."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from backupcore.errors import AccessDenied, BackupError, ConfigError, TargetUnavailable
from backupcore.testing.bench import Bench, Failed, NotApplicable

_AT_ONCE = 4
_STRANGER = "0" * 32
_AWAY = (TargetUnavailable, AccessDenied, ConfigError)


def identity(bench: Bench) -> None:
    """identity() says the same each time, however backups come and go, and is no other place's."""
    _require_hook(bench)
    options = _new(bench) if bench.target.new else bench.target.options
    first = _with_a_backup(bench, options, make=bench.target.new is not None)
    if first is None:
        raise NotApplicable("the place has no identity, and the target names no new one that could be told to make one")
    for known in (first, "", first):
        found = _ask(bench, options, known)
        if found != first:
            raise Failed(f"identity says {found} of the same place that it said {first} of")
    for found in (_with_a_backup(bench, options), _ask(bench, options, first)):
        if found != first:
            raise Failed(f"identity says {found} of the place that it said {first} of, a backup ago")
    if _ask(bench, options, _STRANGER) == _STRANGER:
        raise Failed("identity says that it is whatever place the caller names")
    _nowhere(bench, first)


def _nowhere(bench: Bench, first: str) -> None:
    """A place that does not answer is not the one that is known, and gets no identity."""
    for known, make in ((first, False), ("", True)) if bench.target.away else ():
        try:
            found = _ask(bench, bench.target.away or {}, known, make=make)
        except _AWAY as error:
            bench.tell(error)
        else:
            if found is not None:
                raise Failed(f"a datastore that does not answer has an identity: {found}")


def new_place(bench: Bench) -> None:
    """A new place gets an identity when it is told to and not before, the same for all who tell it, and its own."""
    _require_hook(bench)
    if bench.target.new is None:
        raise NotApplicable("the target names no new place")
    options, other = _new(bench), _new(bench)
    for known in ("", _STRANGER, ""):
        if early := _ask(bench, options, known):
            raise Failed(f"a new place has an identity that nobody has told it to make: {early}")
    made = _at_once(bench, options)
    if len(made) > 1:
        raise Failed(f"{_AT_ONCE} that make an identity in the same moment get {len(made)}")
    mine, others = (_with_a_backup(bench, one, make=True) for one in (options, other))
    if mine is None:
        raise Failed("a place has no identity, though it was told to make one and has had a backup")
    if made - {None, mine}:
        raise Failed(f"identity says {mine} where those that made it were told {', '.join(map(str, made))}")
    if mine == others:
        raise Failed(f"two places have one identity: {mine}")


def _at_once(bench: Bench, options: Mapping[str, object]) -> set[str | None]:
    """What several are told that make an identity in the same moment, each with a driver of its own."""
    together = threading.Barrier(_AT_ONCE)

    def make() -> str | None:
        together.wait(60)
        return _ask(bench, options, "", make=True)

    with bench.threads(_AT_ONCE) as pool:
        jobs = [pool.submit(make) for _ in range(_AT_ONCE)]
        try:
            return {job.result() for job in jobs}
        except BackupError as error:
            bench.tell(error)
            raise Failed(f"{_AT_ONCE} that make an identity in the same moment: {error}") from error


def _require_hook(bench: Bench) -> None:
    if not bench.open().implements("identity"):
        raise NotApplicable("the driver has no identity: its place is known by the backups in it")


def _new(bench: Bench) -> Mapping[str, object]:
    assert bench.target.new
    return bench.target.new()


def _ask(bench: Bench, options: Mapping[str, object], known: str, *, make: bool = False) -> str | None:
    with bench.context() as ctx:
        return bench.open(options=options).identity(known, ctx, make=make)


def _with_a_backup(bench: Bench, options: Mapping[str, object], *, make: bool = False) -> str | None:
    """The identity of a place in which a backup was made, since some get it by that; the backup is deleted again."""
    found = _ask(bench, options, "", make=True) if make else None
    store = bench.open(options=options)
    kept = bench.keep(store=store)
    try:
        return found or _ask(bench, options, "")
    finally:
        with bench.context() as ctx:
            store.delete([kept.source], ctx)
