"""Repositories, runs and contexts for the tests of the restic driver; all with the real restic."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from backupcore.context import Context
from backupcore.model import VM, BackupRun, BytesArtifact, SourceRef, Type, new_id
from backupcore.options import build
from backupcore_restic import Restic, creation
from lab import quick_repository

PASSWORD = "correct horse"

# Artifacts are unpickled by the file view's process, which can import what lies on our path.
sys.path.insert(0, str(Path(__file__).parent))


def new_run(name: str = "web", builds_on: tuple[SourceRef, ...] = ()) -> BackupRun:
    return BackupRun(
        id=new_id(),
        vm=VM(uuid=str(uuid.uuid4()), name=name),
        host="host-a",
        datastore="nas",
        image=new_id(),
        number=0,
        point=new_id(),
        type=Type.FULL,
        builds_on=builds_on,
        date=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    )


def new_artifacts(size: int = 3 << 20) -> list[BytesArtifact]:
    return [
        BytesArtifact("disk.vda.qcow2", os.urandom(size)),
        BytesArtifact("sums.vda", os.urandom(96)),
        BytesArtifact("vm.xml", b"<domain/>"),
        BytesArtifact("nvram", b""),
        BytesArtifact("manifest.json", b'{"format": 1}'),
    ]


@pytest.fixture(scope="session")
def make_run() -> Callable[..., BackupRun]:
    return new_run


@pytest.fixture(scope="session")
def make_artifacts() -> Callable[..., list[BytesArtifact]]:
    return new_artifacts


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where restic's cache goes, for all tests: not into the home of whoever runs them."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def password(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("secrets") / "password"
    path.write_text(f"{PASSWORD}\n")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="session")
def options(home: Path, password: Path) -> Callable[..., Restic]:
    """A driver as the core builds it from a table, for one repository."""

    def make(repository: Path | str, **more: object) -> Restic:
        table = {"repository": str(repository), "cache": str(home), "lock_wait": 0, **more}
        if "password_command" not in table:
            table.setdefault("password_file", str(password))
        return build(Restic, table)

    return make


@pytest.fixture
def ctx(tmp_path: Path) -> Iterator[Context]:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    with Context(folder) as context:
        yield context


def hide_fusermount(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A $PATH without the program that mounts for users: nothing can be mounted, by us or by restic."""
    folder.mkdir()
    for name in ("restic", "ssh", "sh"):
        if program := shutil.which(name):
            (folder / name).symlink_to(program)
    monkeypatch.setenv("PATH", str(folder))


@pytest.fixture
def unmountable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Backups are read by ``restic dump``, since nothing can be mounted."""
    hide_fusermount(monkeypatch, tmp_path / "bin")


@pytest.fixture(params=["mount", "dump"])
def way(request: pytest.FixtureRequest) -> str:
    """Both ways in which backups are read."""
    if request.param == "dump":
        request.getfixturevalue("unmountable")
    return str(request.param)


@pytest.fixture(scope="session")
def pristine(options: Callable[..., Restic], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new repository, made by the driver's first backup, and then given a quick key; tests get copies of it."""
    place = tmp_path_factory.mktemp("pristine") / "repository"
    with Context(tmp_path_factory.mktemp("run")) as context:
        options(place).prebackup(new_run(), context)
    quick_repository.quicken(place, PASSWORD)
    return place


@pytest.fixture(scope="session")
def quicken() -> Callable[[Path], None]:
    """Exchanges the key of a repository that a test has had made, so that it opens at once from then on."""
    return functools.partial(quick_repository.quicken, password=PASSWORD)


@pytest.fixture
def no_other_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other host makes the same repository at a server: what its creation may take is not waited for."""
    monkeypatch.setattr(creation, "SETTLING", 0.0)
    monkeypatch.setattr(creation, "AS_LONG_AS_INIT", 0.0)


@pytest.fixture(scope="session")
def shared(options: Callable[..., Restic], pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Restic:
    """One repository for all tests that leave it whole."""
    return options(shutil.copytree(pristine, tmp_path_factory.mktemp("shared") / "repository"))


@pytest.fixture
def fresh(options: Callable[..., Restic], pristine: Path, tmp_path: Path) -> Restic:
    """A repository of this test's own."""
    return options(shutil.copytree(pristine, tmp_path / "repository"))


@pytest.fixture(scope="session")
def kept(shared: Restic, tmp_path_factory: pytest.TempPathFactory) -> tuple[SourceRef, list[BytesArtifact]]:
    """A backup in `shared` that no test deletes."""
    artifacts = new_artifacts()
    with Context(tmp_path_factory.mktemp("run")) as context:
        return shared.backup(artifacts, new_run(), context).source, artifacts


def restics(repository: str) -> list[int]:
    """The programs, restic or its children, that work on this repository now."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"RESTIC_REPOSITORY={repository}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:  # it has just ended, or is another user's
            continue
    return found


@pytest.fixture(scope="session")
def running() -> Callable[[str], list[int]]:
    return restics


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., None]:
    def wait(condition: Callable[[], object], seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come about in time"
            time.sleep(0.01)

    return wait
