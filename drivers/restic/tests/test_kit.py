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
            large=512 << 20,  # it reads all of a disk, holes as well, through a view
        )


@pytest.mark.usefixtures("unmountable")
class TestResticNotMounted(TestRestic):
    """The same where nothing can be mounted."""
