"""A program that is ended: whoever reads what it writes does not wait for others that hold its pipe."""

from __future__ import annotations

import os
import signal
import threading
import time

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
            os.kill(other, signal.SIGKILL)
