"""What a user installs: wheels alone, in an environment with nothing else, without this repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
DRIVERS = sorted(path.parent.name for path in ROOT.glob("drivers/*/pyproject.toml"))
INSIDE = """
import importlib, json, pkgutil, sys
from importlib.metadata import entry_points
points = [*entry_points(group="backupcore.drivers"), *entry_points(group="backupcore.hypervisors")]
found = {point.name: point.load().__module__ for point in points}
packages = ["backupcore", "vmkeep", *{module.partition(".")[0] for module in found.values()}]
for name in packages:
    package = importlib.import_module(name)
    assert "site-packages" in package.__file__, package.__file__
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        if not module.name.endswith(("__main__", ".driverkit")):  # a program; what needs backupcore[testing]
            importlib.import_module(module.name)
print(json.dumps(found))
"""


def outside(*command: str | Path, cwd: Path) -> str:
    """Run a program that finds nothing of this repository."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of every distribution of this repository."""
    folder = tmp_path_factory.mktemp("wheels")
    build = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation")
    outside(*build, "-w", folder, ROOT, *(ROOT / "drivers" / name for name in DRIVERS), ROOT / "vmkeep", cwd=folder)
    return folder


def requirements(wheel: Path) -> tuple[str, list[str]]:
    """The name of a wheel's distribution and what it requires."""
    with zipfile.ZipFile(wheel) as content:
        [metadata] = [name for name in content.namelist() if name.endswith(".dist-info/METADATA")]
        headers = HeaderParser().parsestr(content.read(metadata).decode())
    return canonicalize_name(headers["Name"]), headers.get_all("Requires-Dist") or []


def needed(wheels: Path, first: Requirement) -> Iterator[str]:
    """The third-party distributions that a requirement of ours leads to, as the metadata declare them."""
    ours = dict(requirements(wheel) for wheel in wheels.glob("*.whl"))
    seen, left = set(), [(first, "")]
    while left:
        requirement, extra = left.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                lines = ours[name] if name in ours else distribution(name).requires or []
                left.extend((Requirement(line), wanted) for line in lines)
    return (name for name in {name for name, _ in seen} if name not in ours)


@pytest.fixture(scope="module")
def installed(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an empty environment into which vmkeep was installed with all its drivers, from the wheels.

    Third-party packages are those of this environment, but only those that the wheels' metadata ask for: one that a
    distribution uses and does not declare is missing there.
    """
    folder = tmp_path_factory.mktemp("empty")
    outside(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    [place] = folder.glob("lib/python*/site-packages")
    ours = Requirement(f"vmkeep[{','.join(DRIVERS)}]")
    here = Path(sysconfig.get_path("purelib"))
    for name in needed(wheels, ours):
        tops = {file.parts[0] for file in distribution(name).files or () if file.parts[0] != ".."}
        for top in tops - {"__pycache__"}:
            (place / top).symlink_to(here / top)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin/python")
    outside(*pip, "install", "--quiet", "--no-index", "--find-links", wheels, str(ours), cwd=folder)
    outside(*pip, "check", cwd=folder)
    return folder / "bin"


def test_vmkeep_and_its_drivers_work_from_their_wheels(installed: Path, tmp_path: Path):
    found = json.loads(outside(installed / "python", "-I", "-c", INSIDE, cwd=tmp_path))
    assert {name: module.partition(".")[0] for name, module in found.items()} == {
        name: f"backupcore_{name}" for name in DRIVERS
    }
    listed = json.loads(outside(installed / "vmkeep", "driver", "list", "--json", cwd=tmp_path))
    assert [one["name"] for one in listed] == sorted(set(DRIVERS) - {"libvirt"})
    assert outside(installed / "vmkeep", "--version", cwd=tmp_path).startswith("vmkeep ")
    outside(installed / "vmkeep", "driver", "new", "tape", cwd=tmp_path)
    assert (tmp_path / "backupcore-tape/pyproject.toml").exists()


def test_the_extras_of_vmkeep_are_the_drivers():
    project = tomllib.loads((ROOT / "vmkeep/pyproject.toml").read_text())["project"]
    assert set(DRIVERS) <= set(project["optional-dependencies"])
    for name in DRIVERS:
        assert (
            tomllib.loads((ROOT / f"drivers/{name}/pyproject.toml").read_text())["project"]["name"]
            in (project["optional-dependencies"][name])
        )


def test_every_wheel_carries_its_types_and_licence(wheels: Path):
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as content:
            names = content.namelist()
            [metadata] = [name for name in names if name.endswith("/METADATA")]
            headers = HeaderParser().parsestr(content.read(metadata).decode())
        assert any(name.endswith("/py.typed") for name in names), wheel.name
        assert headers["License-Expression"] == "Apache-2.0", wheel.name
        assert not any(part in name for name in names for part in ("tests/", "conftest", "__pycache__")), wheel.name
