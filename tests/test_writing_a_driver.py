"""docs/writing-a-driver.md: its code is what `vmkeep driver new` writes, it is installed, and it passes the kit."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from backupcore.testing import CHECKS
from backupcore.testing.processes import wait_for
from vmkeep import new_driver

PAGE = (Path(__file__).parent.parent / "docs/writing-a-driver.md").read_text()


def blocks() -> dict[str, str]:
    """The files that the page gives, put together from their pieces."""
    files: dict[str, list[str]] = {}
    for name, text in re.findall(r"^```\w+ file=(\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        files.setdefault(name, []).append(text)
    return {name: "".join(pieces) for name, pieces in files.items()}


def without_empty_lines(text: str) -> str:
    return re.sub(r"\n+", "\n", text)


def run(*command: str | Path, site: Path, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new")
    new_driver.write("shelf", folder)
    return folder / "backupcore-shelf"


@pytest.fixture(scope="module")
def site(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, installed as any other, in a place of its own."""
    target = tmp_path_factory.mktemp("site")
    pip = ("-m", "pip", "install", "--quiet", "--no-index", "--no-build-isolation", "--no-deps", "--target", target)
    run(*pip, written, site=target, cwd=written)
    return target


DEPOT = ("depot.py", "depot_server.py")


def test_the_page_has_the_files_that_the_command_writes(written: Path):
    shelf = {name: text for name, text in blocks().items() if name not in DEPOT}
    assert set(shelf) == {"pyproject.toml", "src/backupcore_shelf/__init__.py", "tests/test_shelf.py"}
    for name, text in shelf.items():
        assert without_empty_lines(text) == without_empty_lines((written / name).read_text()), name


def test_its_driver_is_installed_and_passes_every_check(written: Path, site: Path):
    assert f"{len(CHECKS)} passed" in run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", site=site, cwd=written
    )


def test_it_is_examined_from_the_command_line(site: Path, tmp_path: Path):
    store = tmp_path / "store"
    store.mkdir()
    words = (
        "driver",
        "test",
        "shelf",
        "-o",
        f"path={store}",
        "--check",
        "token",
        "--check",
        "killed",
        "--check",
        "damage",
    )
    lines = run("-m", "vmkeep", *words, site=site, cwd=tmp_path).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["ok", "ok", "not applicable", "", "2 ok, 1 not applicable"]
    assert not list(store.iterdir())


def test_the_second_driver_is_the_one_that_passes_the_kit():
    """`tests/testing/test_kit.py` makes every check with these files, and a server that stalls and fails."""
    for name in DEPOT:
        there = (Path(__file__).parent / "testing" / name).read_text()
        assert without_empty_lines(blocks()[name]) == without_empty_lines(there), name
    server = blocks()["depot_server.py"].split("class Handler")[1].split("class Server")[0]
    assert len([line for line in server.splitlines() if line.strip()]) <= 42


def test_the_second_driver_runs_as_the_page_has_it(tmp_path: Path):
    for name in DEPOT:
        (tmp_path / name).write_text(blocks()[name])
    (tmp_path / "store").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, tmp_path / "depot_server.py", tmp_path / "store", str(port)])
    try:
        assert wait_for(lambda: answers(port))
        code = (
            "from depot import Depot\n"
            "from backupcore.testing import Target, chosen, examine\n"
            f"target = Target(driver=Depot, options={{'host': '127.0.0.1', 'port': {port}}}, large=1 << 20)\n"
            "names = ['hooks', 'answers', 'round-trip', 'chain', 'delete', 'leaks', 'killed']\n"
            "for one in examine(target, checks=chosen(names)): print(one.check, one.verdict.value, one.why)\n"
        )
        told = run("-c", code, site=tmp_path, cwd=tmp_path).splitlines()
    finally:
        server.kill()
        server.wait()
    assert {line.split()[1] for line in told} == {"ok"}, told
    assert not [path for path in (tmp_path / "store").iterdir() if any(path.iterdir())]


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def test_code_that_is_meant_to_run_runs():
    code = re.findall(r"^```python run\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(code) == 1
    names: dict[str, object] = {}
    exec(code[0], names)
    assert names["store"].name == "nas"  # type: ignore[attr-defined]  # a Datastore
