"""The README's table of shapes, made of the shapes themselves: ``python -m tests.zoo.table`` writes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.zoo.buses import BUSES, IDE
from tests.zoo.firmware import VARIABLES
from tests.zoo.images import IMAGES
from tests.zoo.machines import EVERY
from tests.zoo.missed import MISSED
from tests.zoo.names import LONG_NAME, NAMES
from tests.zoo.shape import Shape

README = Path(__file__).parents[2] / "drivers/libvirt/README.md"
BEGIN = "<!-- This table is made by tests/zoo/table.py of what tests/zoo tries: python -m tests.zoo.table -->"
END = "<!-- The end of that table -->"

_REFUSED = "refused, with what to do"
OTHERS = (
    ("block devices and volumes of storage pools", "full and increments", "a device with `--device`; else as its file"),
    ("VMs with snapshots", "fulls", _REFUSED),
    ("transient disks", "left out by rule; with BACKUP_VOLATILE=YES while the VM is off", "no"),
    ("encrypted (LUKS) disks", "refused, or in plain text where told so", _REFUSED),
)
"""What other tests try."""


def rows() -> Iterator[tuple[str, str, str]]:
    """What it is, how it is backed up, how it is restored in place; shapes of the same words are one row."""
    found: dict[str, list[Shape]] = {}
    for shape in (*IMAGES, *BUSES, IDE, *NAMES, LONG_NAME):
        found.setdefault(shape.words, []).append(shape)
    for words, shapes in found.items():
        whole = [shape.whole for shape in shapes]
        more = ", at times whole" if None in whole else ", whole each time" if all(whole) else ""
        how = f"full and increments{more}"
        yield words, how, _REFUSED if all(shape.alone for shape in shapes) else "yes"
    for words in EVERY:
        yield words, "full and increments", "yes"
    yield from OTHERS
    for words in dict.fromkeys(one.words for one in VARIABLES):
        yield words, "kept with every backup", "yes, with all disks"
    for words in dict.fromkeys(one.words for one in MISSED):
        yield (
            words,
            "left out by name, exit code 3 until EXCLUDE_DISKS names it; refused where nothing else is there",
            "no",
        )


def table() -> str:
    """The table, in Markdown."""
    lines = ["| disks and VMs | backed up, running or off | restored in place |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows()]
    return "\n".join(lines)


def written(text: str) -> str:
    """A README with the table between its marks."""
    before, _, rest = text.partition(f"{BEGIN}\n")
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
