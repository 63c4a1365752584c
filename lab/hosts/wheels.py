"""Wheels of all that constraints.txt names, for the Python of another Debian release, for hosts without a network.

They are fetched by this machine's pip, with its configuration, and nothing of them is run here. libvirt-python comes as
source: it is built in a root of that release, without a network.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lab.hosts.root import FOLDER, Bind, HostNotBuilt, entering, layer, remove_older
from lab.places import ROOT, locked

PYTHON = {"bookworm": "3.11", "trixie": "3.13"}
_PINS = ROOT / "constraints.txt"
# Build backends have build backends, too: that of libvirt-python is named by nobody.
_BUILD = ("setuptools",)
_SOURCE_ONLY = "libvirt-python"


def wheels(suite: str, root: Path | Sequence[Path], *, purpose: str) -> Path:
    """A folder of wheels for the Python of this release; made where it is missing.

    `root` has python3-dev, python3-venv, gcc, pkg-config and libvirt-dev; `purpose` is its own. Raises `HostNotBuilt`.
    """
    folders = [root] if isinstance(root, Path) else list(root)
    made_of = f"{_PINS.read_text()}\n{_BUILD}\n{PYTHON[suite]}\n{[folder.parent.name for folder in folders]}"
    folder = FOLDER / f"wheels-{suite}-{purpose}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"
    with locked(f"hosts-wheels-{suite}-{purpose}"):
        if not folder.exists():
            remove_older(folder)
            fresh = folder.with_name(f"{folder.name}.new")
            fresh.mkdir(parents=True)
            _fetch(suite, fresh)
            _build(folders, fresh)
            fresh.rename(folder)
    return folder


def _fetch(suite: str, folder: Path) -> None:
    pins = [line for line in _PINS.read_text().splitlines() if line and not line.startswith("#")]
    source = [pin for pin in pins if pin.startswith(f"{_SOURCE_ONLY}==")]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    for_it = ["--only-binary", ":all:", "--python-version", PYTHON[suite], "--implementation", "cp"]
    _run([*pip, *for_it, *(pin for pin in pins if pin not in source), *_BUILD])
    _run([*pip, "--no-binary", _SOURCE_ONLY, *source])


def _build(root: Sequence[Path], folder: Path) -> None:
    script = (
        "set -e; python3 -m venv /tmp/build; "
        f"/tmp/build/bin/pip wheel --quiet --no-index --find-links {folder} --no-deps -w {folder} {_SOURCE_ONLY}"
    )
    with layer() as own:
        _run(entering(root, own, ["sh", "-c", script], binds=[Bind(folder, writable=True)]))
    for archive in folder.glob("*.tar.gz"):
        archive.unlink()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise HostNotBuilt(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
