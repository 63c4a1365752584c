"""The conformance kit, on a target of each kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from backupcore.model import SourceRef
from backupcore.testing import DriverKit, Target
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
    )


class TestFolder(DriverKit):
    tidy = False

    @pytest.fixture
    def target(self, make_kind: MakeKind) -> Target:
        kind = make_kind("folder")
        return target_of(kind, f"{kind.root}/none")


@pytest.mark.soak  # some twenty logins each
class TestHost(DriverKit):
    tidy = False

    @pytest.fixture
    def target(self, make_kind: MakeKind) -> Target:
        kind = make_kind("host")
        return target_of(kind, str(kind.options["target"]), port=free_port())


@pytest.mark.soak  # a hundred calls of a daemon
class TestDaemon(DriverKit):
    tidy = False

    @pytest.fixture
    def target(self, make_kind: MakeKind) -> Target:
        return target_of(make_kind("daemon"), f"rsync://me@127.0.0.1:{free_port()}/vms")
