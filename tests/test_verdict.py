"""Whether a run may still become a backup: whoever comes first says so, for good."""

from __future__ import annotations

import threading

import pytest

from backupcore import verdict
from backupcore.errors import Cancelled, TargetFull


def test_a_run_that_was_given_up_cannot_be_claimed(tmp_path):
    assert verdict.given_up(tmp_path) is None
    assert verdict.give_up(tmp_path, TargetFull("scratch is full", "Make room."))
    with pytest.raises(TargetFull, match="scratch is full") as refused:
        verdict.claim(tmp_path)
    assert refused.value.hint == "Make room."
    assert verdict.give_up(tmp_path, Cancelled("later")), "it stays given up"
    assert isinstance(verdict.given_up(tmp_path), TargetFull), "for the first reason"
    assert [path.name for path in tmp_path.iterdir()] == [verdict.FILE]


def test_a_run_that_was_claimed_cannot_be_given_up(tmp_path):
    verdict.claim(tmp_path)
    verdict.claim(tmp_path)
    assert not verdict.give_up(tmp_path, Cancelled("too late"))
    assert verdict.given_up(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "7", '{"kind": "OSError"}', '{"kind": "FILE", "message": "x"}'])
def test_a_verdict_that_cannot_be_read_is_no_permission(tmp_path, text):
    (tmp_path / verdict.FILE).write_text(text)
    with pytest.raises(Cancelled):
        verdict.claim(tmp_path)


def test_of_many_at_once_one_says_it(tmp_path):
    start = threading.Barrier(8)
    claimed, given_up = [], []

    def say(number):
        start.wait()
        if number % 2:
            given_up.append(verdict.give_up(tmp_path, Cancelled("no")))
        else:
            try:
                verdict.claim(tmp_path)
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
