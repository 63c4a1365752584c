"""Every check of the kit can fail: for each there is a driver with one fault that it finds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from backupcore.testing import CHECKS, Target, Verdict, chosen
from backupcore.testing.bench import Bench
from backupcore.testing.examination import look
from tests.testing import broken
from tests.testing.broken import giving
from tests.testing.folder import Folder, tamper

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


@pytest.mark.parametrize(("check", "driver", "why"), FAULTS, ids=lambda value: getattr(value, "__name__", value)[:20])
def test_a_fault_is_found(check: str, driver: type, why: str, tmp_path: Path):
    store, password, place = tmp_path / "store", tmp_path / "password", tmp_path / "place"
    store.mkdir()
    place.mkdir()
    password.write_text("correct horse\n")
    options = {"path": str(store)}
    if issubclass(driver, Folder):
        options |= {"password_file": str(password), "url": "https://me:hunter2@host"}
    target = Target(
        driver=driver,
        options=options,
        tamper=tamper(store),
        secrets=("hunter2",),
        patience=1.0 if "processes" in why or "later" in why else 60.0,
        away={**options, "path": str(tmp_path / "nowhere")},
    )
    bench = Bench(target, place)
    with bench.listening():
        found = look(*chosen([check]), bench)
    assert found.verdict is Verdict.FAILED
    assert re.search(why, found.why), found.why


def test_every_check_has_a_driver_that_fails_it():
    assert {check for check, _, _ in FAULTS} == {check.name for check in CHECKS}


def test_tampering_that_changes_nothing_is_found(tmp_path: Path):
    target = Target(driver=Folder, options={"path": str(tmp_path)}, tamper=lambda source, artifact: None)
    found = look(*chosen(["damage"]), Bench(target, tmp_path))
    assert found.verdict is Verdict.FAILED
