"""What a person at a terminal sees."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest


def at_a_terminal(site, *arguments: str, answer: bytes = b"") -> tuple[int, str]:
    """Run Python with a terminal for all three streams; its exit code and what the screen got."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": site.paths, "VMKEEP_CONFIG": str(site.config), "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    os.write(ours, answer)
    screen = b""
    try:
        while block := os.read(ours, 65536):
            screen += block
    except OSError:
        pass  # Linux says EIO where the other side has been closed
    finally:
        os.close(ours)
    return child.wait(timeout=60), screen.decode()


MOVING = """
import time
from vmkeep.cli.asked import Asked
from vmkeep.cli.progress import shown
with shown(Asked(), "web1") as progress:
    progress.phase("backup", 100 << 20)
    for done in range(0, 60, 10):
        progress.done(done << 20)
        time.sleep(0.15)
"""


def test_the_bar_has_a_rate_and_the_time_left(site):
    code, screen = at_a_terminal(site, "-c", MOVING)
    assert code == 0
    assert re.search(r"web1: backup.*\d+\.\d/100\.0 MiB.* MB/s.*0:00:0\d", screen)


def test_a_backup_shows_a_bar_and_ends_with_the_result(site):
    code, screen = at_a_terminal(site, "-m", "vmkeep", "backup", "web1")
    assert code == 0
    assert "web1: prepare" in screen
    assert re.search(r"web1: FULL backup \(first backup .*\), image 1, increment 0, source \w{8} in nas", screen)


def test_json_on_a_terminal_is_still_one_document_on_stdout(site):
    read, write = os.pipe()
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "vmkeep", "backup", "web1", "--json"],
        env={**os.environ, "PYTHONPATH": site.paths, "VMKEEP_CONFIG": str(site.config), "TERM": "xterm"},
        stdin=subprocess.DEVNULL,
        stdout=write,
        stderr=theirs,
    )
    os.close(write)
    os.close(theirs)
    with os.fdopen(read) as out:
        document = out.read()
    assert child.wait(timeout=60) == 0
    os.close(ours)
    assert document.startswith("{\n")
    assert "\x1b" not in document


@pytest.mark.parametrize(("answer", "code", "left"), [(b"n\n", 130, 1), (b"y\n", 0, 0)])
def test_delete_asks(site, answer, code, left):
    site.run("backup", "web1")
    ended, screen = at_a_terminal(site, "-m", "vmkeep", "image", "delete", "1", answer=answer)
    assert (ended, "Delete image 1 of VM web1, 1 backups, for good?" in screen) == (code, True)
    assert len(site.run("image", "list", "--json").json) == left


CLOSED = """
import os, sys
for number in map(int, sys.argv.pop(1).split(",")):
    os.close(number)
os.execv(sys.executable, [sys.executable, "-m", "vmkeep", *sys.argv[1:]])
"""


@pytest.mark.parametrize("closed", ["0", "1", "2", "0,1,2"])
def test_streams_that_the_caller_has_closed_do_not_matter(site, closed):
    """What is opened instead under their numbers, as the catalog, must not be written to by whoever prints."""
    child = subprocess.run(
        [sys.executable, "-c", CLOSED, closed, "backup", "web1", "-v"],
        env={**os.environ, "PYTHONPATH": site.paths, "VMKEEP_CONFIG": str(site.config)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert ("FULL backup" in child.stdout) == ("1" not in closed)
    assert len(site.run("image", "list", "--json").json) == 1
