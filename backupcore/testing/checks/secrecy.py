"""Secrets stay secret."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

from backupcore.errors import BackupError
from backupcore.model import SourceRef
from backupcore.testing import processes
from backupcore.testing.bench import Bench, Failed, NotApplicable
from backupcore.testing.checks.options import SECRET
from backupcore.testing.given import Held

SHORTEST = 6
"""A shorter secret is found everywhere by chance."""


def _secrets(bench: Bench) -> Iterator[str]:
    """Those that the target names, and what lies in the files that its options name."""
    yield from bench.target.secrets
    for name, value in bench.target.options.items():
        if SECRET.search(name) and name.endswith("_file") and Path(str(value)).is_file():
            for line in Path(str(value)).read_text(errors="replace").splitlines():
                if line.strip() and not line.lstrip().startswith(("#", "[", ";")):
                    yield re.split(r"\s*[=:]\s*", line.strip(), maxsplit=1)[-1]


def secrets(bench: Bench) -> None:
    """No secret shows in the process list during a backup, nor in any log, error or `repr` of the checks before."""
    wanted = {one for one in _secrets(bench) if len(one) >= SHORTEST}
    if not wanted:
        raise NotApplicable("the target names no secret")
    artifacts = bench.artifacts()
    held = Held(artifacts[0], artifacts[0].size // 2, bench.place())
    seen: set[str] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.01):
            there = held.reached
            seen.update(processes.commands().values())
            if there:  # whoever reads the artifacts was seen meanwhile
                held.let_go()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        bench.keep([held, *artifacts[1:]])
    finally:
        ended.set()
        thread.join()
    _provoke(bench)
    places = {
        "a command line": seen,
        "the log": bench.logged,
        "an error": bench.told,
        "the repr of the driver": [repr(bench.target.build())],
    }
    for place, texts in places.items():
        if any(secret in text for secret in wanted for text in texts):
            raise Failed(f"{place} shows a secret")


def _provoke(bench: Bench) -> None:
    """Have the driver say something: of a source that is not there, and of a datastore that is not."""
    with bench.context() as ctx:
        try:
            bench.open().artifacts(SourceRef("0" * 32), ctx)
        except BackupError as error:
            bench.tell(error)
        if bench.target.away is not None:
            try:
                bench.open(options=bench.target.away).check(ctx)
            except BackupError as error:
                bench.tell(error)
