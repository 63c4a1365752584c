"""Nobody answers: the repository's server, or the command that gives its password. All ends, with its group."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backupcore.context import Context
from backupcore.errors import TargetUnavailable
from backupcore.model import BackupRun, BytesArtifact, SourceRef
from backupcore.process import dying
from backupcore.testing.processes import wait_for
from backupcore_restic import Restic
from lab.servers import silent

Options = Callable[..., Restic]
Kept = tuple[SourceRef, list[BytesArtifact]]
Runs = Callable[..., BackupRun]
Artifacts = Callable[..., list[BytesArtifact]]

LIMIT = 2
ENOUGH = 25.0  # seconds: the limit, what restic has to end, and a host that is busy

ASKED: dict[str, Callable[[Restic, SourceRef, Context], object]] = {
    "restore": lambda driver, source, ctx: driver.restore(source, ctx),
    "delete": lambda driver, source, ctx: driver.delete([source], ctx),
    "sources": lambda driver, source, ctx: driver.sources(ctx),
    "check": lambda driver, source, ctx: driver.check(ctx),
}


@pytest.fixture
def no_server() -> Iterator[str]:
    with silent() as port:
        yield f"rest:http://127.0.0.1:{port}/"


@pytest.fixture
def vault(tmp_path: Path) -> Path:
    """A command that waits for somebody to open the vault, and hears no SIGINT."""
    command = tmp_path / "vault"
    command.write_text(f'#!/bin/sh\ntrap "" INT\necho $$ >> "{tmp_path}/vaults"\nexec /bin/sleep 600\n')
    command.chmod(0o755)
    return command


def gone(vault: Path) -> bool:
    """Whether all of them have ended; who has none to wait for it stays for a while, as a zombie."""
    started = [int(pid) for pid in (vault.parent / "vaults").read_text().split()]
    return wait_for(lambda: all(dying(pid) or not Path(f"/proc/{pid}").exists() for pid in started))


@pytest.mark.parametrize("verb", ASKED)
def test_a_server_that_does_not_answer(options: Options, ctx: Context, no_server: str, verb: str) -> None:
    driver = options(no_server, timeout=LIMIT)
    began = time.monotonic()
    with pytest.raises(TargetUnavailable, match="no answer in time"):
        ASKED[verb](driver, SourceRef("a" * 64), ctx)
    assert time.monotonic() - began < ENOUGH


def test_a_file_that_stops_coming(
    options: Options, kept: Kept, shared: Restic, ctx: Context, unmountable: None, vault: Path, tmp_path: Path
) -> None:
    """It is opened while all is well, and read once its password is asked for in vain."""
    driver = options(shared.repository, password_command=f"sh {tmp_path}/turns", timeout=LIMIT)
    (tmp_path / "turns").write_text("echo correct horse")
    disk = next(one for one in driver.restore(kept[0], ctx) if one.name == "disk.vda.qcow2")
    (tmp_path / "turns").write_text(f"exec {vault}")
    with disk.open() as stream, pytest.raises(TargetUnavailable):
        stream.read()
    assert gone(vault)


@pytest.mark.parametrize("verb", ["restore", "check", "backup"])
def test_a_password_that_does_not_come(
    options: Options,
    fresh: Restic,
    ctx: Context,
    make_run: Runs,
    make_artifacts: Artifacts,
    vault: Path,
    verb: str,
) -> None:
    driver = options(fresh.repository, password_command=f"{vault} --item hunter2", timeout=LIMIT)
    began = time.monotonic()
    with pytest.raises(TargetUnavailable, match="the command vault of the option password_command") as caught:
        if verb == "backup":
            driver.backup(make_artifacts(), make_run(), ctx)
        else:
            ASKED[verb](driver, SourceRef("a" * 64), ctx)
    assert "hunter2" not in f"{caught.value}{caught.value.hint}"
    assert "hypervisor" not in caught.value.hint
    assert gone(vault)
    assert time.monotonic() - began < (2 if verb == "backup" else 1) * ENOUGH  # one more to tidy up
    assert not list(Path(fresh.repository, "locks").iterdir())
