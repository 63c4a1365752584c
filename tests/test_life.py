"""Whether the process behind a mark still lives."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest

from backupcore.life import Life


def test_a_mark_says_who_lives():
    own = Life.own()
    assert Life.parse(str(own)) == own
    assert not own.is_over(this_host=True)
    with subprocess.Popen(["sleep", "60"]) as other:
        life = Life.of(other.pid)
        assert not life.is_over(this_host=True)
        other.kill()
        other.wait()
    assert life.is_over(this_host=True)
    assert life.is_over(this_host=False), "by the boot it is known to be of this host"


def test_what_cannot_be_told_counts_as_alive():
    own = Life.own()
    assert replace(own, started="1").is_over(this_host=False), "its number is another process's now"
    before = replace(own, boot="1" * 32)
    assert before.is_over(this_host=True), "this host was started anew since"
    assert not before.is_over(this_host=False), "another host may have the same name"
    assert not replace(own, namespace="1", pid=1 << 22).is_over(this_host=True), "a container's, which nobody sees"
    assert not replace(own, boot="").is_over(this_host=True)


@pytest.mark.parametrize("text", ["", "x", "1-2-3-4", f"{'a' * 32}-1-2", f"{'a' * 32}-1--3", f"{'a' * 32}-1-2-3\n"])
def test_what_is_no_mark(text: str):
    assert Life.parse(text) is None
