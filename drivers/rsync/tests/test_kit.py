"""The conformance kit, on a target of each kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from backupcore import child
from backupcore.model import SourceRef
from backupcore.testing import DriverKit, Target, chosen
from backupcore_rsync import driver, programs
from drivers.rsync.tests.kinds import SECRET, Kind
from lab.servers import free_port

MakeKind = Callable[[str], Kind]


def target_of(kind: Kind, away: str, **more: object) -> Target:
    def tamper(source: SourceRef, artifact: str) -> None:
        path = kind.kept(source) / artifact
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    return Target(
        driver="rsync",
        options=kind.options,
        tamper=tamper,
        secrets=[SECRET],
        away=kind.options | {"target": away} | more,
        stall=kind.stall if kind.server else None,  # of a folder of this host the kernel waits, deaf to all
        fail=kind.fail if kind.name != "daemon" else None,  # whose rsync goes on where the folder was
        new=kind.new if kind.name != "daemon" else None,  # where two markers made at once may cross
    )


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the target stands still, programs and what a backup has left are given up at once, not after a minute."""
    monkeypatch.setattr(driver, "CLEAN_UP", 0.5)
    monkeypatch.setattr(child, "PATIENCE", 0.5)
    monkeypatch.setattr(programs, "PAUSES", (0.1,))


class TestFolder(DriverKit):
    tidy = False

    @pytest.fixture
    def target(self, make_kind: MakeKind) -> Target:
        kind = make_kind("folder")
        return target_of(kind, f"{kind.root}/none")


@pytest.mark.usefixtures("hurried")
class TestStalledHost(DriverKit):
    """It stands still."""

    tidy = False
    checks = chosen(["stalled"])

    @pytest.fixture
    def target(self, make_kind: MakeKind) -> Target:
        kind = make_kind("host")
        return target_of(kind, str(kind.options["target"]), port=free_port())


@pytest.mark.usefixtures("hurried")
@pytest.mark.soak  # some twenty logins each
class TestHost(DriverKit):
    tidy = False

    @pytest.fixture
    def target(self, make_kind: MakeKind) -> Target:
        kind = make_kind("host")
        return target_of(kind, str(kind.options["target"]), port=free_port())


@pytest.mark.usefixtures("hurried")
@pytest.mark.soak  # a hundred calls of a daemon
class TestDaemon(DriverKit):
    tidy = False

    @pytest.fixture
    def target(self, make_kind: MakeKind) -> Target:
        return target_of(make_kind("daemon"), f"rsync://me@127.0.0.1:{free_port()}/vms")
