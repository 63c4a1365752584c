"""Whether a run may still become a backup: whoever comes first says so, for good."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from backupcore import verdict
from backupcore.errors import Cancelled, TargetFull
from lab.blocking_fs import blocking


@pytest.fixture(params=["hard links", "no hard links"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """The private folder of a run, on either kind of file system."""
    if request.param == "hard links":
        yield tmp_path
        return
    with blocking(tmp_path, links=False) as made:
        with pytest.raises(PermissionError):
            (made.path / "link").hardlink_to(_file(made.path / "file"))
        (made.path / "file").unlink()
        yield made.path


def _file(path: Path) -> Path:
    path.touch()
    return path


def test_a_run_that_was_given_up_cannot_be_claimed(folder):
    assert verdict.given_up(folder) is None
    assert verdict.give_up(folder, TargetFull("scratch is full", "Make room."))
    with pytest.raises(TargetFull, match="scratch is full") as refused:
        verdict.claim(folder)
    assert refused.value.hint == "Make room."
    assert verdict.give_up(folder, Cancelled("later")), "it stays given up"
    assert isinstance(verdict.given_up(folder), TargetFull), "for the first reason"
    assert [path.name for path in folder.iterdir()] == [verdict.FILE]


def test_a_run_that_was_claimed_cannot_be_given_up(folder):
    verdict.claim(folder)
    verdict.claim(folder)
    assert not verdict.give_up(folder, Cancelled("too late"))
    assert verdict.given_up(folder) is None


@pytest.mark.parametrize("text", ["", "{", "7", '{"kind": "OSError"}', '{"kind": "FILE", "message": "x"}'])
def test_a_verdict_that_cannot_be_read_is_no_permission(tmp_path, text):
    (tmp_path / verdict.FILE).write_text(text)
    with pytest.raises(Cancelled):
        verdict.claim(tmp_path)


def test_a_verdict_that_is_just_being_written_is_waited_for(tmp_path):
    """So it is without hard links: the name is there a moment before what is said."""
    _file(tmp_path / verdict.FILE)
    writing = threading.Timer(0.1, (tmp_path / verdict.FILE).write_text, ["null"])
    writing.start()
    assert not verdict.give_up(tmp_path, Cancelled("too late")), "the run is being recorded"
    writing.join()


def test_of_many_at_once_one_says_it(folder):
    start = threading.Barrier(8)
    claimed, given_up = [], []

    def say(number):
        start.wait()
        if number % 2:
            given_up.append(verdict.give_up(folder, Cancelled("no")))
        else:
            try:
                verdict.claim(folder)
            except Cancelled:
                claimed.append(False)
            else:
                claimed.append(True)

    threads = [threading.Thread(target=say, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(claimed)) == len(set(given_up)) == 1
    assert claimed[0] is not given_up[0]
