"""Backups that begin in the same moment, each in a process of its own.

`python -m lab.at_once` is such a process: it takes its work from stdin, says "ready", and begins when it is told to.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.places import ROOT

__all__ = ["tokens"]

_PATIENCE = 300.0


def tokens(work: Sequence[tuple[Any, Sequence[Any], Any, Path]]) -> list[str]:
    """The tokens of these first backups, made all at once; each is (driver, artifacts, run, folder of the run).

    AssertionError with what a process has said if it fails.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "lab.at_once"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in work
    ]
    try:
        for process, one in zip(processes, work, strict=True):
            assert process.stdin
            pickle.dump(sys.path, process.stdin)
            pickle.dump(one, process.stdin)
            process.stdin.flush()
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == b"ready\n"
        for process in processes:
            assert process.stdin
            process.stdin.write(b"go\n")
            process.stdin.flush()
        said = [process.communicate(timeout=_PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    failed = [errors.decode() for (_, errors), process in zip(said, processes, strict=True) if process.returncode]
    assert not failed, "\n".join(failed)
    return [output.decode().strip() for output, _ in said]


def main() -> None:
    """One backup."""
    sys.path[:] = pickle.load(sys.stdin.buffer)
    driver, artifacts, run, folder = pickle.load(sys.stdin.buffer)
    from backupcore.context import Context  # noqa: PLC0415 - found by way of the path above

    folder.mkdir(mode=0o700)
    print("ready", flush=True)
    sys.stdin.buffer.readline()
    with Context(folder) as ctx:
        driver.prebackup(run, ctx)
        print(driver.backup(artifacts, run, ctx).source.token, flush=True)


if __name__ == "__main__":
    main()
