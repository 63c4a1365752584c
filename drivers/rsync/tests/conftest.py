"""A target of each kind for the tests of the rsync driver: a folder, a real sshd, a real rsync daemon."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backupcore.context import Context
from drivers.rsync.tests.kinds import ODD, SECRET, Kind, over_ssh
from lab.servers import Sshd, rsync_daemon, sshd


@pytest.fixture(scope="session")
def ssh_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture(scope="session")
def password_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("secrets") / "password"
    path.write_text(f"{SECRET}\n")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """An rsync daemon: its port, and the folder of its module vms. (shut is read-only, keeps does not delete.)"""
    folder = tmp_path_factory.mktemp("daemon")
    secrets, module = folder / "secrets", folder / "module"
    secrets.write_text(f"me:{SECRET}\n")
    secrets.chmod(0o600)
    module.mkdir()
    auth = f"auth users = me\nsecrets file = {secrets}\n"
    modules = (
        f"[vms]\npath = {module}\nread only = no\n{auth}"
        f"[shut]\npath = {module}\nread only = yes\n{auth}"
        f"[keeps]\npath = {module}\nread only = no\nrefuse options = delete\n{auth}"
        f"[lost]\npath = {folder}/not-there\nread only = no\n{auth}"
    )
    with rsync_daemon(folder, modules) as port:
        yield port, module


@pytest.fixture
def make_kind(tmp_path: Path, ssh_server: Sshd, daemon: tuple[int, Path], password_file: Path) -> Callable[[str], Kind]:
    """An empty target of one kind, in a folder with an odd name."""

    def make(name: str) -> Kind:
        if name == "daemon":
            port, module = daemon
            root = module / f"{ODD}{uuid.uuid4().hex}"
            url = f"rsync://me@127.0.0.1:{port}/vms/{root.name}"
            options: dict[str, object] = {"target": url, "password_file": str(password_file)}
            server = int((module.parent / "pid").read_text())
        else:
            root = tmp_path / ODD
            options = over_ssh(ssh_server, root) if name == "host" else {"target": str(root)}
            server = ssh_server.process.pid if name == "host" else 0
            if name == "folder by rsync":
                options["rsync_arguments"] = ["--times"]
        root.mkdir()
        return Kind(name, root, options, server)

    return make


@pytest.fixture(params=["folder", "folder by rsync", "host", "daemon"])
def kind(request: pytest.FixtureRequest, make_kind: Callable[[str], Kind]) -> Kind:
    """An empty target of each kind."""
    return make_kind(request.param)


@pytest.fixture
def ctx(tmp_path: Path) -> Iterator[Context]:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    with Context(folder) as context:
        yield context
