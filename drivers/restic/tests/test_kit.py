"""The conformance kit, on a repository in a folder of this host."""

from __future__ import annotations

from pathlib import Path

import pytest

from backupcore.model import SourceRef
from backupcore.testing import DriverKit, Target
from backupcore_restic import Restic

SECRET = "correct horse"


@pytest.mark.soak  # every call of restic takes half a second to derive its key
class TestRestic(DriverKit):
    tidy = False

    @pytest.fixture
    def target(self, fresh: Restic, tmp_path: Path, home: Path, password: Path) -> Target:
        def tamper(source: SourceRef, artifact: str) -> None:
            packs = [path for path in Path(fresh.repository, "data").rglob("*") if path.is_file()]
            pack = max(packs, key=lambda path: path.stat().st_size)
            pack.chmod(0o600)
            data = bytearray(pack.read_bytes())
            for offset in range(0, len(data), 4096):  # whatever artifact lies there
                data[offset] ^= 1
            pack.write_bytes(data)

        options = {"repository": fresh.repository, "password_file": str(password), "cache": str(home)}
        return Target(
            driver="restic",
            options=options,
            tamper=tamper,
            secrets=[SECRET],
            away=options | {"repository": str(tmp_path / "nowhere" / "at all")},
        )
