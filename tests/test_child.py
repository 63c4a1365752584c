"""A program that ends, or is ended: whoever reads what it writes does not wait for others that hold its pipe."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import sh

from backupcore import child as children
from backupcore.child import Child


def test_a_pipe_that_another_process_holds_ends_with_the_program(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(children, "PATIENCE", 0.2)
    # As the ssh to which others hand their pipes: in a session of its own, which no signal to the group reaches.
    script = "setsid sleep 60 & echo $!; exec sleep 60"
    with Child(sh.Command("sh"), ["-c", script], dict(os.environ)) as started:
        other = int(started.output.read(100))
        began = time.monotonic()
        threading.Timer(0.1, started.stop).start()
        try:
            assert started.output.read(100) == b""
            assert time.monotonic() - began < 20
            assert started.wait() < 0
        finally:
            with suppress(ProcessLookupError):
                os.kill(other, signal.SIGKILL)


AGENT = """#!/bin/sh
setsid sh -c 'trap "" INT TERM; echo $$ > "$1"; exec sleep 300' agent "$1" &
while ! [ -s "$1" ]; do sleep 0.05; done
echo answer
"""


def script(folder: Path, text: str) -> sh.Command:
    path = folder / "program"
    path.write_text(text)
    path.chmod(0o755)
    return sh.Command(str(path))


def start(folder: Path, text: str) -> tuple[Child, Path]:
    agent = folder / "agent"
    return Child(script(folder, text), [str(agent)], {"PATH": os.defpath}, folder), agent


@pytest.mark.parametrize("read", [lambda file: file.read(100), lambda file: file.readall(), lambda file: file.read()])
def test_an_answer_ends_with_the_program_that_gives_it(tmp_path, read):
    child, agent = start(tmp_path, AGENT)
    before = time.monotonic()
    try:
        with child:
            assert read(child.output) == b"answer\n"
            assert child.output.read(100) == b""
            assert child.wait() == 0
        assert time.monotonic() - before < 60, "the agent holds its stdout for 300 s"
        assert Path("/proc", agent.read_text().strip()).exists(), "it was asked for, and nothing went wrong"
    finally:
        os.kill(int(agent.read_text()), 9)


def test_a_program_that_is_given_up_takes_along_what_it_has_started_in_a_session_of_its_own(tmp_path):
    child, agent = start(tmp_path, AGENT + "exec sleep 300\n")
    with child:
        assert child.output.read(7) == b"answer\n"
        child.stop()
        assert child.output.read(100) == b""
        assert child.wait() != 0
    left = Path("/proc", agent.read_text().strip(), "stat")
    deadline = time.monotonic() + 30
    while left.exists() and ") Z " not in left.read_text():
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(0.02)
