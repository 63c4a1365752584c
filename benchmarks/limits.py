"""What nothing that reads a guest's disk can beat here: C programs alone do the reading, and none of our work."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from benchmarks.figures import Figure
from benchmarks.measure import Sample, compared, run
from benchmarks.place import Place
from benchmarks.served import served
from benchmarks.stores import S3, Folder, Restic

__all__ = ["rows"]

# The read that a backup has to make, at the same time as the upload of what was read before.
_BESIDE = "nbdcopy {uri} null: & {work}; code=$?; wait; exit $code"

_THROUGH = """
mkdir -p {view}; nbdfuse {view}/disk {uri} & until [ -e {view}/disk ]; do sleep 0.01; done
{work}; code=$?; fusermount3 -u {view}; wait; exit $code
"""


_MOUNTED = """
mkdir -p {view}; restic mount --no-lock {view} > {view}.log & until [ -e {view}/snapshots/latest ]; do sleep 0.01; done
{work}; code=$?; fusermount3 -u {view}; wait; exit $code
"""

_PIPED = "set -o pipefail; restic dump -q latest {ready} | {work}"


def rows(place: Place, rounds: int) -> Iterator[Figure]:
    """The figures."""
    ready, socket = place.folder / "ready.qcow2", place.vms / "limits.sock"
    place.ready(place.filled, ready)
    with served(place.filled.disk("vda"), "qcow2", socket) as uri:
        with closing(S3(place)) as s3:
            upload = [
                sys.executable,
                "-m",
                "benchmarks.transfer",
                s3.server.url,
                "bench",
                "upload",
                "ready",
                str(ready),
            ]
            yield from compared(
                "upload to S3 while a disk is read",
                {
                    "boto3 beside nbdcopy": lambda: _shell(_BESIDE, uri, upload, s3.environment),
                    "boto3": lambda: s3.put(ready),
                },
                rounds,
            )
        with closing(Folder(place)) as folder:
            copy = folder.target / "copied.raw"

            def copied() -> Sample:
                copy.unlink(missing_ok=True)
                return run("nbdcopy", "--flush", uri, copy)

            yield from compared(
                "copy of a disk to a folder", {"nbdcopy": copied, "rsync": lambda: folder.put(ready)}, rounds
            )
    with served(ready, "raw", socket) as uri:
        store, view = Restic(place), place.folder / "view"
        backup = [*("restic", "backup", "--force", "-q"), str(view / "disk")]
        store.put(ready)  # so that both find all of it there
        yield from compared(
            "second full by restic through a view",
            {
                "restic through nbdfuse": lambda: _shell(_THROUGH, uri, backup, store.environment(store.beside), view),
                "restic": lambda: store.put(ready),
            },
            rounds,
        )
        copy, variables = place.folder / "copied.qcow2", store.environment(store.beside)
        write = ["dd", f"of={copy}", "bs=8M", "iflag=fullblock", "conv=fsync", "status=none"]

        def fetched(script: str, *more: str) -> Sample:
            try:
                return _shell(script, str(ready), [*write, *more], variables, view)
            finally:
                copy.unlink()

        yield from compared(
            "a full out of restic by other means than its dump to a file",
            {
                "dd from restic mount": lambda: fetched(_MOUNTED, f"if={view}/snapshots/latest{ready}"),
                "dd from restic dump": lambda: fetched(_PIPED),
                "restic dump": lambda: store.got(copy),
            },
            rounds,
        )
        store.close()


def _shell(script: str, source: str, work: list[str], environment: dict[str, str], view: Path | None = None) -> Sample:
    quoted = shlex.quote(source)
    line = script.format(uri=quoted, ready=quoted, work=shlex.join(work), view=shlex.quote(str(view)))
    return run("bash", "-c", line, environment=environment)
