"""Run the benchmarks: `make bench`, or python -m benchmarks [--rounds N] [ROW …]."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks import full_restic, full_rsync, full_s3, increments, reading, startup
from benchmarks.vm import MIB, filled
from lab import libvirtd
from lab.places import LAB

ROWS = {
    "startup": startup.rows,
    "reading": reading.rows,
    "full-restic": full_restic.rows,
    "full-s3": full_s3.rows,
    "full-rsync": full_rsync.rows,
    "increments": increments.rows,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], help="which to run; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=int, default=2048, help="MiB of data on the disk")
    asked = parser.parse_args()
    LAB.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=LAB))
    try:
        with libvirtd.running() as uri:
            base = libvirtd.folder_for_vms()
            vm_folder = Path(tempfile.mkdtemp(prefix="bench-", dir=base))
            os.chown(vm_folder, base.stat().st_uid, base.stat().st_gid)
            try:
                size, data = 2 * asked.data * MIB, asked.data * MIB
                with filled(uri, folder, vm_folder, size=size, data=data, name=f"bench-{os.getpid()}") as place:
                    for name in asked.rows or ROWS:
                        for line in ROWS[name](place, asked.rounds):
                            print(line, flush=True)
            finally:
                shutil.rmtree(vm_folder, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
