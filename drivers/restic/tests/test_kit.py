"""The conformance kit, on a repository in a folder of this host."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from backupcore import child
from backupcore.model import SourceRef, new_id
from backupcore.testing import DriverKit, Target, chosen
from backupcore_restic import Restic, repository
from lab.servers import stoppable_rclone

SECRET = "correct horse"


@pytest.mark.soak  # every call of restic takes half a second to derive its key
class TestRestic(DriverKit):
    tidy = False

    @pytest.fixture
    def target(self, fresh: Restic, tmp_path: Path, home: Path, password: Path) -> Target:
        def tamper(source: SourceRef, artifact: str) -> None:
            for pack in [path for path in Path(fresh.repository, "data").rglob("*") if path.is_file()]:
                pack.chmod(0o600)
                pack.write_bytes(bytes(byte ^ 1 for byte in pack.read_bytes()))  # whatever artifact lies there

        options = {"repository": fresh.repository, "password_file": str(password), "cache": str(home), "lock_wait": 0}
        return Target(
            driver="restic",
            options=options,
            tamper=tamper,
            secrets=[SECRET],
            away=options | {"repository": str(tmp_path / "nowhere" / "at all")},
            new=lambda: options | {"repository": str(tmp_path / new_id())},
            large=512 << 20,  # it reads all of a disk, holes as well, through a view
        )


@pytest.mark.usefixtures("unmountable")
class TestResticNotMounted(TestRestic):
    """The same where nothing can be mounted."""


class TestResticStalled(DriverKit):
    """Its server stands still."""

    tidy = False
    checks = chosen(["stalled"])

    @pytest.fixture
    def target(
        self, pristine: Path, tmp_path: Path, home: Path, password: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[Target]:
        # A minute, for what a stopped backup has left, and five seconds for each restic to remove its lock.
        monkeypatch.setattr(repository, "CLEAN_UP", 0.5)
        monkeypatch.setattr(child, "PATIENCE", 0.5)
        shutil.copytree(pristine, tmp_path / "served" / "web")
        with stoppable_rclone(tmp_path / "served", "restic") as (port, server):

            @contextmanager
            def stall() -> Iterator[None]:
                server.send_signal(signal.SIGSTOP)
                try:
                    yield
                finally:
                    server.send_signal(signal.SIGCONT)

            options = {"repository": f"rest:http://127.0.0.1:{port}/web/", "password_file": str(password)}
            yield Target(driver="restic", options=options | {"cache": str(home), "lock_wait": 0}, stall=stall)
