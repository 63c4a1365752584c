"""Our work beside what a user would run instead, on the same live VM: `make bench`, or python -m benchmarks."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import TextIO

import libvirt

from benchmarks import (
    catalog,
    flatten,
    full_restic,
    full_rsync,
    full_s3,
    guest,
    held,
    increments,
    instant,
    limits,
    listing,
    long_chain,
    machine,
    proof,
    reading,
    record,
    restore_chain,
    six_disks,
    sparse,
    startup,
    ten_vms,
)
from benchmarks.figures import MIB, Figure, line
from benchmarks.place import Place
from lab import libvirtd
from lab.places import LAB, ROOT

ROUNDS, DATA = 5, 2048
DOCS = ROOT / "docs"


@dataclass(frozen=True)
class Subject:
    """A row that can be asked for: its module, and about how many minutes it takes by default on 2 cores."""

    module: ModuleType
    minutes: float

    @property
    def rows(self) -> Callable[[Place, int], Iterator[Figure]]:
        """What measures it."""
        found: Callable[[Place, int], Iterator[Figure]] = self.module.rows
        return found

    @property
    def about(self) -> str:
        """In words: what its module says first."""
        return " ".join((self.module.__doc__ or "").split("\n\n", maxsplit=1)[0].split())


ROWS = {
    "startup": Subject(startup, 0.1),
    "catalog": Subject(catalog, 1),
    "reading": Subject(reading, 2),
    "limits": Subject(limits, 5),
    "full-restic": Subject(full_restic, 6),
    "full-s3": Subject(full_s3, 5),
    "full-rsync": Subject(full_rsync, 5),
    "instant": Subject(instant, 1),
    "proof": Subject(proof, 1),
    "sparse": Subject(sparse, 5),
    "six-disks": Subject(six_disks, 5),
    "increments": Subject(increments, 5),
    "restore-chain": Subject(restore_chain, 9),
    "long-chain": Subject(long_chain, 5),
    "flatten": Subject(flatten, 15),
    "ten-vms": Subject(ten_vms, 6),
    "guest": Subject(guest, 8),
    "held": Subject(held, 10),
    "listing": Subject(listing, 20),
}


def main() -> int:
    """Measure the rows that are asked for, print them, and put them into the record where they are of full size."""
    asked = _asked()
    told = sys.stderr if asked.json else sys.stdout
    LAB.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=LAB))
    # restic would leave a cache for each of the repositories, which are all gone afterwards.
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    rows = []
    try:
        with libvirtd.running() as uri:
            base = libvirtd.folder_for_vms()
            vms = Path(tempfile.mkdtemp(prefix="bench-", dir=base))
            os.chown(vms, base.stat().st_uid, base.stat().st_gid)
            try:
                with closing(Place(uri, folder, vms, asked.data * MIB)) as place:
                    for name in asked.rows or ROWS:
                        row = _measured(name, place, asked.rounds, told)
                        rows.append(row)
                        if asked.record:
                            record.write(asked.record, [row], ROWS)
            finally:
                shutil.rmtree(vms, ignore_errors=True)
    except (libvirtd.LibvirtMissing, libvirt.libvirtError, OSError, RuntimeError) as error:
        print(f"{error}\nThe rest was not measured.", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if asked.json:
        print(json.dumps([row.as_json() for row in rows], indent=1))
    if not asked.record:
        print("Nothing was recorded: that takes --rounds 5 and --data 2048 at least, or --record FOLDER.", file=told)
    return 0


def _asked() -> argparse.Namespace:
    total = sum(subject.minutes for subject in ROWS.values())
    times = "\n".join(f"  {name:15} {subject.minutes:4g} min  {subject.about}" for name, subject in ROWS.items())
    parser = argparse.ArgumentParser(
        prog="make bench",
        description=__doc__,
        epilog=f"rows, with their times by default on 2 quiet cores ({total:.0f} min in all):\n{times}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="which to measure; all by default")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"how often each rival runs; {ROUNDS}")
    parser.add_argument("--data", type=int, default=DATA, metavar="MIB", help=f"of data on the disk; {DATA}")
    parser.add_argument("--json", action="store_true", help="print one JSON document; the lines go to stderr")
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FOLDER",
        help="put the rows into benchmarks.json and benchmarks.md there, whatever their size. By default into docs, if "
        "the rounds and the data are not fewer than by default",
    )
    asked = parser.parse_args()
    if unknown := [name for name in asked.rows if name not in ROWS]:
        parser.error(f"no row {', '.join(unknown)}; there are: {', '.join(ROWS)}")
    if asked.record is None and asked.rounds >= ROUNDS and asked.data >= DATA:
        asked.record = DOCS
    return asked


def _measured(name: str, place: Place, rounds: int, told: TextIO) -> record.Row:
    subject = ROWS[name]
    started = time.monotonic()
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    with place.row(name):
        places = {str(place.folder): "DIR", str(place.vms): "VMS", f"{Path(sys.executable).parent}/": ""}
        figures: list[Figure] = []
        measured = (record.plain(figure, places) for figure in subject.rows(place, rounds))
        for _, some in groupby(measured, lambda figure: (figure.what, figure.by)):
            these = list(some)
            print(line(these), file=told, flush=True)
            figures += these
    print(f"{name} took {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return record.Row(
        name=name,
        about=subject.about,
        date=date,
        commit=machine.commit(),
        rounds=rounds,
        data=place.data // MIB,
        machine=machine.described(),
        versions=machine.versions(),
        figures=tuple(figures),
    )


if __name__ == "__main__":
    sys.exit(main())
