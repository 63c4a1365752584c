"""Stdout and stderr that cannot be written to: no backup is lost, and what was not told is not taken for told."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

ENDS = ["/dev/full", "a pipe that nobody reads", "closed"]


def run(site, *arguments: str, out: str = "", err: str = "") -> subprocess.CompletedProcess[str]:
    """`vmkeep` with one or both of its streams going to one of `ENDS`."""
    read, pipe = os.pipe()
    os.close(read)
    full = os.open("/dev/full", os.O_WRONLY)
    ends = {"/dev/full": full, "a pipe that nobody reads": pipe, "closed": None, "": None}
    closed = [str(number) for number, end in ((1, out), (2, err)) if end == "closed"]
    shell = 'exec "$@" ' + " ".join(f"{number}>&-" for number in closed)
    try:
        return subprocess.run(
            ["sh", "-c", shell, "sh", sys.executable, "-m", "vmkeep", *arguments],
            env={**os.environ, "PYTHONPATH": site.paths, "VMKEEP_CONFIG": str(site.config)},
            stdin=subprocess.DEVNULL,
            stdout=ends[out] or subprocess.PIPE,
            stderr=ends[err] or subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(pipe)
        os.close(full)


def count(site) -> int:
    return len(site.run("image", "show", "1", "--json").json["increments"])


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("more", [[], ["--json"], ["-v"]], ids=["plain", "json", "verbose"])
def test_a_backup_whose_progress_cannot_be_told_is_done(site, end, more):
    told = run(site, "backup", "web1", *more, err=end)
    assert (told.returncode, count(site)) == (0, 1)
    assert told.stdout


@pytest.mark.parametrize("end", ENDS[:2])
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["plain", "json"])
def test_a_backup_whose_end_cannot_be_told_stays_recorded_and_says_so(site, end, more):
    told = run(site, "backup", "web1", *more, out=end)
    assert (told.returncode, count(site)) == (1, 1)
    last = told.stderr.splitlines()[-1]
    if more:
        last = json.loads(last)["error"]["message"]
    assert "its output could not be written" in last
    assert "bug" not in told.stderr
    assert run(site, "backup", "web1", *more, out=end, err=end).returncode == 1
    assert count(site) == 2


def test_a_stdout_that_was_closed_on_purpose_is_no_fault(site):
    told = run(site, "backup", "web1", out="closed")
    assert (told.returncode, count(site)) == (0, 1)
    assert run(site, "backup", "web1", out="closed", err="closed").returncode == 0


@pytest.mark.parametrize("end", ENDS[:2])
def test_no_verb_calls_it_a_bug(site, end):
    assert site.run("backup", "web1").code == 0
    for verb in (
        ["image", "list"],
        ["image", "list", "--json"],
        ["image", "verify", "1"],
        ["vm", "show", "web1"],
        ["restore", "1", "--stdout", "--disk", "vda"],
        ["vm", "compare", "web1", "--json"],
        ["--help"],
        ["--version"],
    ):
        told = run(site, *verb, out=end)
        assert told.returncode != 0, verb
        quiet = end != "/dev/full" and not {"list", "show", "--help", "--version"}.isdisjoint(verb)
        assert bool(told.stderr) != quiet, verb
        assert "bug" not in told.stderr, verb
        assert "Exception ignored" not in told.stderr, verb
