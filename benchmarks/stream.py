"""What a driver does with an artifact, less the driver: python -m benchmarks.stream SOCKET EXPORT [SUMS].

It prints how many seconds that took, less the start of Python: a run has started when it comes to its artifacts.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from backupcore.disk.extents import Kind, to_clusters
from backupcore.disk.nbd import ALLOCATION, Address, Client, allocation
from backupcore.disk.qcow2 import DiskArtifact, Layout
from backupcore.disk.sums import HashedDisk


def main(socket: str, export: str, sums: str = "") -> None:
    """Read the export as a disk artifact to its end; with `sums`, digests are taken to that file."""
    started = time.monotonic()
    address = Address(socket, export)
    with Client(address, [ALLOCATION]) as client:
        held = (extent for extent in allocation(client, 0, client.size) if extent.kind is Kind.DATA)
        disk = DiskArtifact("disk.vda.qcow2", Layout(client.size, to_clusters(held, client.size)), address)
    artifact = HashedDisk(disk, Path(sums)) if sums else disk
    buffer = memoryview(bytearray(4 << 20))  # as S3 and a folder ask for it
    with artifact.open() as stream:
        while stream.readinto(buffer):  # type: ignore[attr-defined]  # BinaryIO has no readinto, every such stream does
            pass
    artifact.close()
    print(time.monotonic() - started)


if __name__ == "__main__":
    main(*sys.argv[1:])
