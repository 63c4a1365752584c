"""The direction of dependencies: who may import what, and what importing the core costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DRIVERS = sorted(path.name for path in (ROOT / "drivers").iterdir() if (path / "pyproject.toml").exists())

OTHER_PROGRAMS = {"libvirt", "boto3", "botocore", "sh", "click", "rich", "vmkeep"}


def modules(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*.py")) if "tests" not in path.relative_to(folder).parts)


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions, as absolute dotted names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def first(name: str) -> str:
    return name.split(".", maxsplit=1)[0]


def check(folder: Path, forbidden: object, why: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(folder)
        for name in sorted(imports(path))
        if forbidden(path, name)  # type: ignore[operator]  # a callable
    ]
    assert not wrong, f"{why}: {wrong}"


def test_the_core_knows_no_driver_no_libvirt_and_no_command_line():
    ours = {f"backupcore_{name}" for name in DRIVERS}
    check(
        ROOT / "backupcore",
        lambda path, name: first(name) in OTHER_PROGRAMS | ours,
        "the core stands below everything else",
    )


def test_the_data_plane_knows_errors_and_model_only():
    allowed = ("backupcore.errors", "backupcore.model", "backupcore.disk")
    check(
        ROOT / "backupcore" / "disk",
        lambda path, name: first(name) == "backupcore" and name != "backupcore" and not name.startswith(allowed),
        "backupcore.disk knows no hooks and no drivers",
    )


def test_the_contract_imports_nothing_heavy():
    for name in ("hookspecs", "model", "errors", "context", "hypervisor", "plugins", "options"):
        source = ast.parse((ROOT / "backupcore" / f"{name}.py").read_text())
        at_import = {
            first(module)
            for node in source.body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for module in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])
        }
        assert at_import <= {"backupcore", "pluggy", *sys.stdlib_module_names}, name


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_driver_knows_the_core_only(driver: str):
    others = {f"backupcore_{name}" for name in DRIVERS if name != driver} | {"vmkeep", "click", "rich"}
    check(ROOT / "drivers" / driver, lambda path, name: first(name) in others, "drivers never know each other")
    check(
        ROOT / "drivers" / driver,
        lambda path, name: first(name) == "backupcore" and any(part.startswith("_") for part in name.split(".")),
        "drivers use public names only",
    )


@pytest.mark.parametrize(
    ("package", "home"),
    [("libvirt", "drivers/libvirt"), ("boto3", "drivers/s3"), ("botocore", "drivers/s3"), ("sh", "drivers")],
)
def test_a_foreign_package_has_one_home(package: str, home: str):
    for room in ("backupcore", "drivers", "vmkeep"):
        check(
            ROOT / room,
            lambda path, name: first(name) == package and not path.is_relative_to(ROOT / home),
            f"{package} is for {home} alone",
        )


def test_host_tooling_asks_plugins_by_name():
    check(
        ROOT / "vmkeep",
        lambda path, name: first(name).startswith("backupcore_") or first(name) in {"libvirt", "sh", "boto3"},
        "vmkeep opens drivers and hypervisors through the core",
    )


def test_importing_the_core_executes_nothing():
    code = "import sys; before = set(sys.modules); import backupcore; print(*(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    outside = {first(name) for name in loaded.stdout.split()} - {"backupcore", *sys.stdlib_module_names}
    assert not outside


def test_importing_the_core_is_quick():
    """Under 0.15 s, contract included; in processor time, best of five: another test may be running beside it."""
    code = (
        "import time; start = time.process_time();"
        "import backupcore, backupcore.hookspecs, backupcore.model, backupcore.context;"
        "print(time.process_time() - start)"
    )
    runs = [
        float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    ]
    assert min(runs) < 0.15
