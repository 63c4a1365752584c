"""Every check of the kit can fail: for each there is a driver with one fault that it finds."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from backupcore.testing import CHECKS, Target, Verdict, chosen, examine
from backupcore.testing.bench import Bench
from backupcore.testing.examination import look
from tests.testing.broken import (
    answers,
    contents,
    failures,
    listing,
    neighbours,
    opening,
    optional,
    reading,
    secrecy,
    store,
    tokens,
    traces,
)
from tests.testing.broken.reading import giving
from tests.testing.depot import Depot
from tests.testing.folder import Folder, tamper
from tests.testing.marked import lock
from tests.testing.moody import Moody, moody

FAULTS = [
    ("hooks", opening.Default, "ctx has a default"),
    ("hooks", opening.Misspelt, "chek"),
    ("hooks", opening.Lacking, "does not implement: restore, delete, sources"),
    ("wrong-options", opening.Silent, "without a word on what they mean: tries"),
    ("secret-options", opening.OpenPassword, "password: take a file or a command"),
    ("secret-options", opening.Talkative, "shows the secret option url"),
    ("answers", answers.NoAnswer, "check returned NoneType"),
    ("answers", answers.Unsure, "did not delete"),
    ("away", answers.Careless, "nothing was raised"),
    ("away", answers.Creating, "nothing was raised"),
    ("usage", answers.Boastful, "more is free"),
    ("usage", answers.Fractional, "used=1.5"),
    ("round-trip", contents.NoEmptyFiles, r"missing \['nvram'\]"),
    ("round-trip", contents.Textual, "vm.xml does not come back as it was given"),
    ("round-trip", contents.LastBlock, "disk.vda.qcow2 does not come back"),
    ("odd-names", contents.Lower, "missing .*'A'"),
    ("odd-names", contents.OwnNames, r"missing \['labels.json'\]"),
    ("read-at", giving(reading.Shifted), "gives other bytes"),
    ("read-at", giving(reading.Unbounded), "EOFError"),
    ("several-readers", giving(reading.Shared), "early|do not all give"),
    ("closed-early", giving(reading.Fragile), "closed before its end"),
    ("closed-early", giving(reading.Piped), "processes are left behind"),
    ("other-process", giving(reading.Locked), "cannot be pickled"),
    ("other-process", giving(reading.Elsewhere), "in another process: .*No such file"),
    ("token", tokens.Remembering, "never seen"),
    ("token", tokens.Stringly, "no SourceRef"),
    ("two-tokens", tokens.ByContent, "two backups got one token"),
    ("unknown-tokens", tokens.Prefixed, "can be restored"),
    ("unknown-tokens", tokens.Sloppy, "no source"),
    ("mixed-tokens", tokens.Halves, "put together from two tokens, can be restored"),
    ("labels", listing.NoEmptyLabels, "labels do not come back as they were given: parent"),
    ("labels", listing.TwiceListed, "listed 2 times"),
    ("only-complete", listing.Eager, "before all of it is stored"),
    ("delete", listing.FirstOnly, "a deleted backup is still listed"),
    ("delete", listing.Strict, "No such file"),
    ("builds-on", answers.Trusting, "nothing was raised where IncrementImpossible"),
    ("postbackup", answers.Once, "postbackup, called again"),
    ("postbackup", answers.Zealous, "no source"),
    ("giver-fails", failures.Stubborn, "done although a read failed at byte 0"),
    ("giver-fails", failures.Blaming, "became TargetUnavailable"),
    ("giver-lies", failures.Padding, "ends early: nothing was raised"),
    ("cancelled", failures.LeavingParts, "cancelled at byte 0: nothing was raised"),
    ("cancelled", failures.Slow, "ended . s later"),
    ("no-child-survives", traces.Littering, "processes are left behind"),
    ("killed", listing.Eager, "whose process was killed is listed"),
    ("killed", traces.Littering, "processes outlive"),
    ("killed-at-the-end", listing.Late, "listed, and not complete"),
    ("concurrent", neighbours.OnePlace, "."),
    ("two-hosts", neighbours.Sweeping, "No such file"),
    ("two-hosts", neighbours.SameName, "no source"),
    ("two-hosts", neighbours.ByHost, "No such file"),
    ("flatten", neighbours.InPlace, "the source of a backup that it merged|does not come back|comes back with"),
    ("flatten", neighbours.ByNumber, "the source of a backup that it merged"),
    ("flatten", neighbours.Impatient, "no source"),
    ("flatten", neighbours.PointIsMine, "no source"),
    ("secrets", secrecy.Logging, "the log shows a secret"),
    ("secrets", secrecy.Arguing, "a command line shows a secret"),
    ("secrets", secrecy.Quoting, "an error shows a secret"),
    ("secrets", secrecy.Reading, "the log shows a secret"),
    ("chain", answers.FullsOnly, "an increment became a full"),
    ("damage", answers.Vague, "TargetUnavailable"),
    ("identity", optional.Fresh, r"identity says \w+ of the same place"),
    ("identity", optional.Credulous, "whatever place the caller names"),
    ("new-place", optional.Reserved, "though it was told to make one"),
]

ALONE = [
    # red by this check and by no other
    (
        "hooks",
        opening.Singular,
        "driver Singular: delete: there is no argument source; this hook may take sources, ctx",
    ),
    ("hooks", opening.Undecorated, "delete must be decorated with @backupcore.hookimpl"),
    ("answers", answers.Negative, "backup returned stored=-5 cannot be"),
    ("answers", answers.Stringy, "sources gave str where a Listed was expected"),
    ("usage", answers.Quitting, "usage failed with SystemExit"),
    ("new-token", tokens.Numbered, "was given again after its backup had been deleted"),
    ("deleted-for-all", listing.Caching, "a deleted backup that was read before: nothing was raised"),
    ("cancelled-late", failures.Asleep, "cancelled after its last read ended"),
    ("manifest-last", listing.ByName, "killed before all its artifacts were there is listed"),
    ("killed-deleting", listing.ManifestLast, r"killed at step \d+ of \d+ is listed, and not complete"),
    ("refused-writes", store.Hopeful, "done although its files could not be written"),
    ("refused-writes", store.Unheeding, "a backup to a store that refuses from the begin"),
    ("refused-writes", store.Assuring, "the driver says is deleted, though the store refused"),
    ("stalled", store.Deaf, "that waits for the store goes on . s after it was cancelled"),
    ("litter", traces.Spooling, "files are left in the folder for temporary files"),
    ("leaks", traces.Threaded, "4 more threads"),
    ("leaks", traces.Open, "4 more open files"),
    ("large", contents.Short, "comes back with other bytes at 3"),
    ("large", contents.Unsigned, "comes back with other bytes at 429"),
    ("large", contents.Hoarding, "MiB of memory are held while a disk of"),
    ("identity", optional.Renaming, r"identity says \w+.again of the same place"),
    ("identity", optional.Counting, "a backup ago"),
    ("identity", optional.Loyal, "a datastore that does not answer has an identity"),
    ("identity", optional.Mounting, "a datastore that does not answer has an identity"),
    ("new-place", optional.Hasty, "that nobody has told it to make"),
    ("new-place", optional.Racing, "in the same moment get 4"),
    ("new-place", optional.Alike, "two places have one identity"),
    ("locks", optional.Over, "a lock that was over at 2"),
    ("locks", optional.Zoneless, "neither a time with its zone nor None"),
    ("locks", optional.Everything, "a source that is not there: 0000"),
    ("locks", optional.Unasked, "ffff, which it was not asked for"),
    ("locks", optional.Unlocked, "does not name a backup that the store locks"),
    ("locks", optional.Forcing, "delete deletes what locks calls locked"),
    ("locks", optional.Sealed, "delete deletes what locks calls locked"),
    ("sources-of", optional.Fulls, "lacks 1 of the 4 backups"),
    ("sources-of", optional.Own, "lacks . of the 4 backups"),
    ("sources-of", optional.Everyones, "what sources does not list"),
    ("sources-of", optional.Bare, "other labels than sources"),
    ("sources-of", optional.Doubling, "more than once"),
    ("sources-of", optional.Keeping, "what sources does not list"),
]


def named(value: object) -> str:
    return str(getattr(value, "__name__", value))[:20]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Moody]:
    (tmp_path / "served").mkdir()
    with moody(tmp_path / "served") as found:
        yield found


def target_of(driver: type, why: str, tmp_path: Path, server: Moody) -> Target:
    """A target with all that it takes, for a driver of either kind."""
    impatient = "processes" in why or "later" in why or "last read" in why or "goes on" in why
    if issubclass(driver, Depot):
        return server.target(driver, patience=2.0 if impatient else 15.0)
    store, password = tmp_path / "store", tmp_path / "password"
    store.mkdir()
    password.write_text("correct horse\n")
    options = {"path": str(store)}
    if issubclass(driver, Folder):
        options |= {"password_file": str(password), "url": "https://me:hunter2@host"}
    enough = {contents.Unsigned: Target.large, contents.Hoarding: 1 << 30}  # the kit's own takes seconds
    return Target(
        driver=driver,
        options=options,
        large=enough.get(driver, 80 << 20),
        tamper=tamper(store),
        secrets=("hunter2",),
        patience=1.0 if impatient else 60.0,
        away={**options, "path": str(tmp_path / "nowhere")},
        lock=lock(store),
        new=lambda: {**options, "path": tempfile.mkdtemp(dir=tmp_path)},
    )


@pytest.mark.parametrize(("check", "driver", "why"), FAULTS + ALONE, ids=named)
def test_a_fault_is_found(check: str, driver: type, why: str, tmp_path: Path, server: Moody):
    target = target_of(driver, why, tmp_path, server)
    (tmp_path / "place").mkdir()
    bench = Bench(target, tmp_path / "place")
    with bench.listening():
        found = look(*chosen([check]), bench)
    assert found.verdict is Verdict.FAILED
    assert re.search(why, found.why), found.why


@pytest.mark.soak  # the whole kit for each
@pytest.mark.parametrize(("check", "driver", "why"), ALONE, ids=named)
def test_a_fault_is_found_by_its_own_check_alone(check: str, driver: type, why: str, tmp_path: Path, server: Moody):
    target = target_of(driver, why, tmp_path, server)
    results = examine(target, folder=tmp_path)
    assert {one.check: one.why for one in results if one.verdict is Verdict.FAILED}.keys() == {check}, results
    if check in ("hooks", "answers"):
        rest = results[[one.check for one in results].index(check) + 1 :]
        assert {one.why for one in rest} == {f"{check} failed, which all checks stand on"}


def test_every_check_has_a_driver_that_fails_it():
    assert {check for check, _, _ in FAULTS + ALONE} == {check.name for check in CHECKS}


def test_tampering_that_changes_nothing_is_found(tmp_path: Path):
    target = Target(driver=Folder, options={"path": str(tmp_path)}, tamper=lambda source, artifact: None)
    found = look(*chosen(["damage"]), Bench(target, tmp_path))
    assert found.verdict is Verdict.FAILED
