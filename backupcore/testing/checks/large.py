"""Artifacts larger than memory, and than 32 bits can count."""

from __future__ import annotations

import pickle
import subprocess
import tempfile
import time
from pathlib import Path

from backupcore.testing import processes
from backupcore.testing.bench import MIB, Bench, Failed, NotApplicable
from backupcore.testing.given import Sparse

MEMORY = 256 * MIB
"""What a process may take beyond what it began with, whatever the size of a disk."""

_LOOK = 0.02  # seconds
_AT_MOST = 1800.0  # seconds, for a slow store


def large(bench: Bench) -> None:
    """A disk beyond 4 GiB, nearly all of it zeros, comes back, and at no time is all of it held in memory."""
    if bench.target.kind is None:
        raise NotApplicable("the driver lives in this process only, and so may what it keeps")
    disk = Sparse("disk.vda.qcow2", bench.target.large)
    with bench.context() as ctx, tempfile.TemporaryFile(dir=ctx.folder) as answer:
        arguments = (bench.target.elsewhere, [disk, *bench.artifacts()[1:]], bench.run(), ctx.folder)
        child = processes.start("keep and compare", *arguments, stdout=answer)
        try:
            _watch(child, disk.size)
        finally:
            if child.poll() is None:
                child.kill()
            err = child.communicate()[1].decode(errors="replace").strip().splitlines()
        if child.returncode:
            raise Failed(f"a disk of {disk.size} bytes: {err[-1] if err else f'exit code {child.returncode}'}")
        answer.seek(0)
        if wrong := pickle.load(answer):  # noqa: S301 - from our own child
            raise Failed(wrong)


def _watch(child: subprocess.Popen[bytes], size: int) -> None:
    """Wait for its end, and look at its memory meanwhile: what a file maps does not count."""
    began = None
    deadline = time.monotonic() + _AT_MOST
    while child.poll() is None:
        held = _memory(child.pid)
        if began is None and held > 16 * MIB:  # Python is there
            began = held
        if began is not None and held - began > MEMORY:
            raise Failed(f"{(held - began) // MIB} MiB of memory are held while a disk of {size} bytes is kept or read")
        if time.monotonic() > deadline:
            raise Failed(f"a disk of {size} bytes was not kept and read after {_AT_MOST:.0f} s")
        time.sleep(_LOOK)


def _memory(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    pages = [line.split() for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem"))]
    return sum(int(words[1]) for words in pages) << 10
