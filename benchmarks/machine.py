"""What the figures were measured on: the machine, and the versions of all that took part."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from lab.places import ROOT

__all__ = ["commit", "described", "versions"]

_PROGRAMS = {
    "QEMU": ("qemu-img", "--version"),
    "libvirt": ("libvirtd", "--version"),
    "restic": ("restic", "version"),
    "rsync": ("rsync", "--version"),
    "nbdcopy": ("nbdcopy", "--version"),
    "virtnbdbackup": ("virtnbdbackup", "--version"),
    "SeaweedFS": (str(Path(sys.executable).with_name("weed")), "version"),
}


def described() -> str:
    """The machine in a line: processor, cores, memory, system."""
    model = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    system = re.search(r'^PRETTY_NAME="?(.+?)"?$', Path("/etc/os-release").read_text(), re.MULTILINE)
    return (
        f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB of memory, "
        f"{system[1] if system else 'Linux'}, Linux {platform.release()}; guests in software emulation"
    )


def versions() -> dict[str, str]:
    """The versions of ours, of Python and of the programs; "" where one does not say."""
    found = {"vmkeep": metadata.version("vmkeep"), "Python": platform.python_version()}
    found["boto3"] = metadata.version("boto3")
    for name, command in _PROGRAMS.items():
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        number = re.search(r"\d+(?:\.\d+)+", told.stdout + told.stderr)
        found[name] = number[0] if number else ""
    return found


def commit() -> str:
    """The commit that is checked out, with a + where files differ from it; "" outside a repository."""
    head = _git("rev-parse", "--short", "HEAD")
    # The record itself changes with the first row.
    others = (".", ":!docs/benchmarks.json", ":!docs/benchmarks.md")
    return head + "+" if head and _git("status", "--porcelain", "--untracked-files=no", "--", *others) else head


def _git(*arguments: str) -> str:
    told = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False)
    return told.stdout.strip() if told.returncode == 0 else ""
