"""The record of what was measured: benchmarks.json, and benchmarks.md that is made of it, side by side in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure
from benchmarks.measure import COSTS

__all__ = ["Row", "plain", "write"]

_INTRODUCTION = """\
# Benchmarks

Our work beside what a user would run instead, on the same live VM. `make bench` measured all this and wrote this file;
`make bench ARGS="ROW …"` measures some rows anew and leaves the others, each of which says when it was measured and on
what. [benchmarks.json](benchmarks.json) has the same for machines.

**How.** The rivals take turns, in every round in the other order; figures are medians, with the smallest and the
largest of the rounds. Ratios are taken round by round; a target is one for the median. The disks are filled with data
of which half is random, a quarter text, and a quarter one block again and again; files are in the page cache, but for
those that ours writes past it. A tool alone (restic, boto3, rsync) starts from a qcow2 file that lies ready. rsync is
told to sync, as ours does; qemu-img, restic dump, virtnbdbackup and virtnbdrestore do not, which favours them.
virtnbdbackup refuses a VM that has checkpoints of others, so where it makes its own it has a second VM, of equal
content.

- **processor**: seconds of the command and all its children. QEMU, libvirtd and an S3 server are not among them.
- **memory**: the most that all processes of the command had resident at once, looked at twenty times a
  second; pages that two of them share count twice.
- **read**: what QEMU read of the VM's disks, by its own count (for qemu-img: what it read itself).
- **written**: what went to the host's disks meanwhile, whoever wrote it, up to a sync at the end.
- **frozen**: how long the guest stood still, by vmkeep's own word.
- **bytes through the host** (flatten; both ways): between vmkeep and the server for S3; elsewhere all that the
  processes read and wrote by system calls, so a byte that passes a pipe or a view counts on either side of it.
- **latency** (guest): by the guest's own clock, which stands still where its processors do.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row as it was measured: `date` in UTC, `rounds`, MiB of `data`, `about` in words, and what took part."""

    name: str
    about: str
    date: str
    commit: str
    rounds: int
    data: int
    machine: str
    versions: dict[str, str]
    figures: tuple[Figure, ...]

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {**asdict(self), "figures": [figure.as_json() for figure in self.figures]}

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Row:
        """What `as_json` gave."""
        return cls(**{**told, "figures": tuple(Figure.from_json(one) for one in told["figures"])})


def plain(figure: Figure, places: dict[str, str]) -> Figure:
    """The figure with its commands free of this run's own paths: each of `places` is replaced by its word."""
    commands = list(figure.commands)
    for path, word in places.items():
        commands = [command.replace(path, word) for command in commands]
    return replace(figure, commands=tuple(commands))


def write(folder: Path, measured: Sequence[Row], order: Iterable[str]) -> None:
    """Put rows into the record, in place of their namesakes; `order` is that of all rows."""
    path = folder / "benchmarks.json"
    known = {row.name: row for row in map(Row.from_json, json.loads(path.read_text()))} if path.exists() else {}
    known |= {row.name: row for row in measured}
    rows = [known[name] for name in order if name in known]
    path.write_text(json.dumps([row.as_json() for row in rows], indent=1) + "\n")
    (folder / "benchmarks.md").write_text("\n".join([_INTRODUCTION, *_summary(rows), *map(_section, rows)]))


def _summary(rows: Sequence[Row]) -> Iterator[str]:
    yield "## Targets\n"
    yield from _table(
        ("row", "what", "of", "measured", "at most", "met"),
        [
            (f"[{row.name}](#{row.name})", *_judged(figure))
            for row in rows
            for figure in row.figures
            if figure.met is not None
        ],
    )


def _judged(figure: Figure) -> tuple[str, ...]:
    unit = f" {figure.unit}" if figure.unit else ""
    target = "" if figure.at_most is None else f"{figure.at_most:g}{unit}"
    met = {None: "", True: "yes", False: "**no**"}[figure.met]
    return figure.what, f"{figure.by}, {figure.measure}", f"{figure.spread}{unit}", target, met


def _section(row: Row) -> str:
    costs = [figure for figure in row.figures if figure.measure in COSTS]
    others = [figure for figure in row.figures if figure.measure not in COSTS]
    lines = [
        f"## {row.name}\n",
        f"{row.about}\n",
        f"{row.date}, commit {row.commit or 'not known'}, {row.rounds} rounds, {row.data} MiB of data. {row.machine}.",
        f"{', '.join(f'{name} {number}' for name, number in row.versions.items())}.\n",
    ]
    units = [f"{measure} ({unit})" for measure, (unit, _) in COSTS.items()]
    works = []
    for (what, by), figures in groupby(costs, lambda figure: (figure.what, figure.by)):
        found = {figure.measure: str(figure.spread) for figure in figures}
        works.append((what, by, *(found.get(measure, "") for measure in COSTS)))
    lines += _table(("work", "by", *units), works)
    lines += _table(("work", "of", "measured", "at most", "met"), [_judged(figure) for figure in others])
    if commands := list(_commands(costs)):
        lines += ["<details><summary>Commands</summary>\n", "```sh", *commands, "```\n", "</details>\n"]
    return "\n".join(lines)


def _commands(figures: Sequence[Figure]) -> Iterator[str]:
    for figure in figures:
        if figure.commands:
            yield f"# {figure.what}: {figure.by}"
            yield from figure.commands


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    if not lines:
        return
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for cells in lines:
        yield f"| {' | '.join(cells)} |"
    yield ""
