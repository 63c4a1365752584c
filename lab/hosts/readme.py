"""The commands of the README's first backup, as they stand there: the hosts of the tests run what a user types."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lab.places import ROOT

_HEADING = "## A first backup"


@dataclass(frozen=True)
class FirstBackup:
    """Its commands, each a line for a shell, in the order of the README."""

    packages: tuple[str, ...]
    install: tuple[str, ...]
    use: tuple[str, ...]


def first_backup(readme: Path = ROOT / "README.md") -> FirstBackup:
    """What the README says under its heading "A first backup"; ValueError where one of the three parts is missing."""
    _, found, rest = readme.read_text().partition(f"{_HEADING}\n")
    section = rest.partition("\n#")[0]
    lines = [line.strip() for line in section.splitlines() if line.startswith("    ")]
    typed = "\n".join(lines).replace("\\\n", "").splitlines()
    packages = [line for line in typed if line.startswith("sudo apt ")]
    use = [line for line in typed if line.startswith("sudo vmkeep ")]
    install = [line for line in typed if line not in packages and line not in use]
    if not (found and packages and install and use) or typed != [*packages, *install, *use]:
        raise ValueError(f"{readme}: '{_HEADING}' is expected to name packages, then the installation, then the use")
    return FirstBackup(tuple(packages), tuple(install), tuple(use))
