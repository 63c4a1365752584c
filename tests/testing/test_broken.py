"""Every check of the kit can fail: for each there is a driver with one fault that it finds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from backupcore.testing import CHECKS, Target, Verdict, chosen, examine
from backupcore.testing.bench import Bench
from backupcore.testing.examination import look
from tests.testing import broken
from tests.testing.broken import giving
from tests.testing.depot import Depot
from tests.testing.folder import Folder, tamper
from tests.testing.moody import Moody, moody

FAULTS = [
    ("hooks", broken.Default, "ctx has a default"),
    ("hooks", broken.Misspelt, "chek"),
    ("hooks", broken.Lacking, "does not implement: restore, delete, sources"),
    ("wrong-options", broken.Silent, "without a word on what they mean: tries"),
    ("secret-options", broken.OpenPassword, "password: take a file or a command"),
    ("secret-options", broken.Talkative, "shows the secret option url"),
    ("answers", broken.NoAnswer, "check returned NoneType"),
    ("answers", broken.Unsure, "did not delete"),
    ("away", broken.Careless, "nothing was raised"),
    ("away", broken.Creating, "nothing was raised"),
    ("usage", broken.Boastful, "more is free"),
    ("usage", broken.Fractional, "used=1.5"),
    ("round-trip", broken.NoEmptyFiles, r"missing \['nvram'\]"),
    ("round-trip", broken.Textual, "vm.xml does not come back as it was given"),
    ("round-trip", broken.LastBlock, "disk.vda.qcow2 does not come back"),
    ("odd-names", broken.Lower, "missing .*'A'"),
    ("odd-names", broken.OwnNames, r"missing \['labels.json'\]"),
    ("read-at", giving(broken.Shifted), "gives other bytes"),
    ("read-at", giving(broken.Unbounded), "EOFError"),
    ("several-readers", giving(broken.Shared), "early|do not all give"),
    ("closed-early", giving(broken.Fragile), "closed before its end"),
    ("closed-early", giving(broken.Piped), "processes are left behind"),
    ("other-process", giving(broken.Locked), "cannot be pickled"),
    ("other-process", giving(broken.Elsewhere), "in another process: .*No such file"),
    ("token", broken.Remembering, "never seen"),
    ("token", broken.Stringly, "no SourceRef"),
    ("two-tokens", broken.ByContent, "two backups got one token"),
    ("unknown-tokens", broken.Prefixed, "can be restored"),
    ("unknown-tokens", broken.Sloppy, "no source"),
    ("mixed-tokens", broken.Halves, "put together from two tokens, can be restored"),
    ("labels", broken.NoEmptyLabels, "labels do not come back as they were given: parent"),
    ("labels", broken.TwiceListed, "listed 2 times"),
    ("only-complete", broken.Eager, "before all of it is stored"),
    ("delete", broken.FirstOnly, "a deleted backup is still listed"),
    ("delete", broken.Strict, "No such file"),
    ("builds-on", broken.Trusting, "nothing was raised where IncrementImpossible"),
    ("postbackup", broken.Once, "postbackup, called again"),
    ("postbackup", broken.Zealous, "no source"),
    ("giver-fails", broken.Stubborn, "done although a read failed at byte 0"),
    ("giver-fails", broken.Blaming, "became TargetUnavailable"),
    ("giver-lies", broken.Padding, "ends early: nothing was raised"),
    ("cancelled", broken.LeavingParts, "cancelled at byte 0: nothing was raised"),
    ("cancelled", broken.Slow, "ended . s later"),
    ("no-child-survives", broken.Littering, "processes are left behind"),
    ("killed", broken.Eager, "whose process was killed is listed"),
    ("killed", broken.Littering, "processes outlive"),
    ("killed-at-the-end", broken.Late, "listed, and not complete"),
    ("concurrent", broken.OnePlace, "."),
    ("two-hosts", broken.Sweeping, "No such file"),
    ("two-hosts", broken.SameName, "no source"),
    ("two-hosts", broken.ByHost, "No such file"),
    ("flatten", broken.InPlace, "the source of a backup that it merged|does not come back|comes back with"),
    ("flatten", broken.Impatient, "no source"),
    ("flatten", broken.PointIsMine, "no source"),
    ("secrets", broken.Logging, "the log shows a secret"),
    ("secrets", broken.Arguing, "a command line shows a secret"),
    ("secrets", broken.Quoting, "an error shows a secret"),
    ("secrets", broken.Reading, "the log shows a secret"),
    ("chain", broken.FullsOnly, "an increment became a full"),
    ("damage", broken.Vague, "TargetUnavailable"),
]

ALONE = [
    # red by this check and by no other
    ("hooks", broken.Singular, "driver Singular: delete: there is no argument source; this hook may take sources, ctx"),
    ("hooks", broken.Undecorated, "delete must be decorated with @backupcore.hookimpl"),
    ("answers", broken.Negative, "backup returned stored=-5 cannot be"),
    ("answers", broken.Stringy, "sources gave str where a Listed was expected"),
    ("usage", broken.Quitting, "usage failed with SystemExit"),
    ("new-token", broken.Numbered, "was given again after its backup had been deleted"),
    ("deleted-for-all", broken.Caching, "a deleted backup that was read before: nothing was raised"),
    ("cancelled-late", broken.Asleep, "cancelled after its last read ended"),
    ("manifest-last", broken.ByName, "killed before all its artifacts were there is listed"),
    ("killed-deleting", broken.ManifestLast, r"killed at step \d+ of \d+ is listed, and not complete"),
    ("refused-writes", broken.Hopeful, "done although its files could not be written"),
    ("refused-writes", broken.Unheeding, "a backup to a store that refuses from the begin"),
    ("refused-writes", broken.Assuring, "the driver says is deleted, though the store refused"),
    ("stalled", broken.Deaf, "that waits for the store goes on . s after it was cancelled"),
    ("litter", broken.Spooling, "files are left in the folder for temporary files"),
    ("leaks", broken.Threaded, "4 more threads"),
    ("leaks", broken.Open, "4 more open files"),
    ("large", broken.Short, "comes back with other bytes at 3"),
    ("large", broken.Unsigned, "comes back with other bytes at 429"),
    ("large", broken.Hoarding, "MiB of memory are held while a disk of"),
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
    enough = {broken.Unsigned: Target.large, broken.Hoarding: 1 << 30}  # the kit's own takes seconds
    return Target(
        driver=driver,
        options=options,
        large=enough.get(driver, 80 << 20),
        tamper=tamper(store),
        secrets=("hunter2",),
        patience=1.0 if impatient else 60.0,
        away={**options, "path": str(tmp_path / "nowhere")},
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
