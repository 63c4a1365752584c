"""Reading a live VM's disk: the artifact as a stream to nowhere, with and without digests, beside nbdcopy."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks.measure import Sample, Spread, interleaved, run
from benchmarks.vm import Place

__all__ = ["rows"]

# What a driver does with an artifact, less the driver.
_STREAM = """
import sys
from pathlib import Path
from backupcore.disk.extents import Kind, to_clusters
from backupcore.disk.nbd import ALLOCATION, Address, Client, allocation
from backupcore.disk.qcow2 import DiskArtifact, Layout
from backupcore.disk.sums import HashedDisk
address = Address(sys.argv[1], "vda")
with Client(address, [ALLOCATION]) as client:
    held = (extent for extent in allocation(client, 0, client.size) if extent.kind is Kind.DATA)
    disk = DiskArtifact("disk.vda.qcow2", Layout(client.size, to_clusters(held, client.size)), address)
artifact = HashedDisk(disk, Path(sys.argv[2])) if len(sys.argv) > 2 else disk
buffer = memoryview(bytearray(1 << 20))
with artifact.open() as stream:
    while stream.readinto(buffer):
        pass
artifact.close()
"""


def rows(place: Place, rounds: int) -> Iterator[str]:
    """The lines of the table."""
    socket = place.vm.folder.parent / "read.sock"
    server = subprocess.Popen(
        [
            *("qemu-nbd", "-r", "-t", "-e", "8", "-k", str(socket), "-x", "vda"),
            # The VM runs, so its QEMU holds the lock; it writes nothing meanwhile.
            *("--image-opts", f"driver=qcow2,force-share=on,file.filename={place.vm.disk('vda')}"),
        ]
    )
    try:
        deadline = time.monotonic() + 10
        while not socket.exists():
            if time.monotonic() > deadline:
                raise TimeoutError("qemu-nbd does not listen")
            time.sleep(0.02)
        sums = place.folder / "sums"

        def hashed() -> Sample:
            sums.unlink(missing_ok=True)
            return run(sys.executable, "-c", _STREAM, socket, sums)

        taken = interleaved(
            {
                "nbdcopy": lambda: run("nbdcopy", f"nbd+unix:///vda?socket={socket}", "null:"),
                "artifact": lambda: run(sys.executable, "-c", _STREAM, socket),
                "artifact with digests": hashed,
            },
            rounds,
        )
    finally:
        server.terminate()
        server.wait()
        socket.unlink(missing_ok=True)
    for name, samples in taken.items():
        yield f"reading, {name}: {Spread.of([one.wall for one in samples])} s"
    for name in ("artifact", "artifact with digests"):
        ratios = [ours.wall / theirs.wall for ours, theirs in zip(taken[name], taken["nbdcopy"], strict=True)]
        yield f"reading, {name} to nbdcopy: {Spread.of(ratios)}"
