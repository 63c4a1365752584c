"""What a driver does with an artifact, less the driver: python -m benchmarks.stream SOCKET EXPORT [SUMS].

With SUMS a process of its own reads the disk and takes the digests, as in a backup. It prints how many seconds that
took, less the start of Python: a run has started when it comes to its artifacts.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from backupcore.disk.extents import Kind, to_clusters
from backupcore.disk.nbd import ALLOCATION, Address, Client, allocation
from backupcore.disk.qcow2 import DiskArtifact, Layout
from backupcore.disk.reader import Reader, memory, pair, serve
from backupcore.disk.sums import HashedDisk
from backupcore.model import Artifact


def main(socket: str, export: str, sums: str = "") -> None:
    """Read the export as a disk artifact to its end; with `sums`, digests are taken to that file."""
    reader = _forked() if sums else None
    if reader is not None:
        reader.call(int)  # it has started
    started = time.monotonic()
    address = Address(socket, export)
    read(_shown(address, Path(sums), reader) if reader is not None else _artifact(address, _layout(address)))
    print(time.monotonic() - started)
    if reader is not None:
        reader.close()
        os.waitpid(reader.pid, 0)  # what it used counts as ours


def read(artifact: Artifact) -> None:
    """From the first byte to the last, in the steps in which S3 and a folder ask for it."""
    buffer = memory(4 << 20)
    with artifact.open() as stream:
        while stream.readinto(buffer):  # type: ignore[attr-defined]  # BinaryIO has no readinto, every such stream does
            pass
    artifact.close()


def _forked() -> Reader:
    """A reader as a backup has it: forked, without a start of Python of its own."""
    ours, theirs = pair()
    child = os.fork()
    if not child:
        serve(theirs)
    theirs.close()
    return Reader(ours, child)


def _shown(address: Address, sums: Path, reader: Reader) -> Artifact:
    return reader.show(HashedDisk(_artifact(address, reader.call(_layout, address)), sums))


def _artifact(address: Address, layout: Layout) -> DiskArtifact:
    return DiskArtifact("disk.vda.qcow2", layout, address)


def _layout(address: Address) -> Layout:
    with Client(address, [ALLOCATION]) as client:
        held = (extent for extent in allocation(client, 0, client.size) if extent.kind is Kind.DATA)
        return Layout(client.size, to_clusters(held, client.size))


if __name__ == "__main__":
    # Not of `__main__`, whose functions another process does not find.
    from benchmarks.stream import main as run

    run(*sys.argv[1:])
