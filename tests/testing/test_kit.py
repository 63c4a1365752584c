"""The kit passes drivers that keep the contract."""

from __future__ import annotations

import pytest

from backupcore.testing import DriverKit, MemoryDriver, Target
from tests.testing.folder import Folder, tamper


class TestMemory(DriverKit):
    @pytest.fixture(scope="class")
    @classmethod
    def target(cls) -> Target:
        return Target(driver=MemoryDriver())


class TestFolder(DriverKit):
    @pytest.fixture(scope="class")
    @classmethod
    def target(cls, tmp_path_factory: pytest.TempPathFactory) -> Target:
        folder = tmp_path_factory.mktemp("store")
        password = tmp_path_factory.mktemp("secrets") / "password"
        password.write_text("correct horse\n")
        return Target(
            driver=Folder,
            options={"path": str(folder), "password_file": str(password), "url": "https://me:hunter2@host"},
            tamper=tamper(folder),
            secrets=("hunter2",),
            away={"path": str(folder / "nowhere")},
        )
