"""The kit passes drivers that keep the contract."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest

from backupcore.errors import ConfigError
from backupcore.testing import DriverKit, MemoryDriver, Target, Verdict, chosen, examine
from backupcore.testing.bench import Bench
from backupcore.testing.life import NoVM
from backupcore.testing.memory import CopyingMemoryDriver
from tests.testing.broken import answers, opening
from tests.testing.contract_1.shelf import Shelf
from tests.testing.depot import Depot
from tests.testing.folder import Folder, tamper
from tests.testing.marked import Marked, lock
from tests.testing.moody import moody


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


class TestMarked(DriverKit):
    """Its optional hooks, which the others lack; what the rest looks at is Folder's."""

    checks = chosen(["hooks", "answers", "identity", "new-place", "sources-of", "delete", "locks"])

    @pytest.fixture(scope="class")
    @classmethod
    def target(cls, tmp_path_factory: pytest.TempPathFactory) -> Target:
        folder = tmp_path_factory.mktemp("store")
        return Target(
            driver=Marked,
            options={"path": str(folder)},
            away={"path": str(folder / "nowhere")},
            lock=lock(folder),
            new=lambda: {"path": str(tmp_path_factory.mktemp("new"))},
        )


class TestContract1(DriverKit):
    """What `vmkeep driver new` wrote for version 1 of the contract: it goes on passing, as long as that counts."""

    @pytest.fixture
    def target(self, tmp_path: Path) -> Target:
        store = tmp_path / "store"
        store.mkdir()
        away = {"path": str(tmp_path / "not-there")}
        # It writes no holes, so beyond 4 GiB it takes their room.
        return Target(driver=Shelf, options={"path": str(store)}, tamper=tamper(store), away=away, large=80 << 20)


class TestDepot(DriverKit):
    """The second driver of docs/writing-a-driver.md, with a server that stalls and fails on demand."""

    @pytest.fixture(scope="class")
    @classmethod
    def target(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
        with moody(tmp_path_factory.mktemp("served")) as server:
            yield server.target(Depot)


class TestSome(DriverKit):
    checks = chosen(["usage", "hooks"])

    @pytest.fixture
    def target(self) -> Target:
        return Target(driver=MemoryDriver())

    def test_something_else(self, target: Target):
        assert target.name == "MemoryDriver"


@pytest.mark.parametrize("driver", [opening.Undecorated, opening.Singular, answers.Stringy])
def test_one_cause_is_one_failure(driver: type, tmp_path: Path):
    options = {"path": str(tmp_path)}
    results = examine(Target(driver=driver, options=options), folder=tmp_path)
    failed = [result for result in results if result.verdict is Verdict.FAILED]
    assert len(failed) == 1
    assert driver.__name__ in failed[0].why
    assert "\n" not in failed[0].why
    after = results[results.index(failed[0]) + 1 :]
    assert {result.why for result in after} == {f"{failed[0].check} failed, which all checks stand on"}
    old = Target(driver=MemoryDriver())
    with pytest.warns(DeprecationWarning, match="hypervisor=hypervisor"):
        assert old.open(plugins=[NoVM()]).name == "kit"


def test_a_driver_that_flattens_on_its_own_side(tmp_path: Path):
    [result] = examine(Target(driver=CopyingMemoryDriver()), checks=chosen(["flatten"]), folder=tmp_path)
    assert result.verdict is Verdict.OK, result.why


def test_without_pytest_what_was_made_is_deleted_again(tmp_path: Path):
    memory, heard = MemoryDriver(), []
    kept = dict(memory.kept)
    results = examine(Target(driver=memory), checks=chosen(["labels", "usage", "damage"]), heard=heard.append)
    assert results == heard
    assert [result.verdict for result in results] == ["ok", "ok", "not applicable"]
    assert "tampers" in results[2].why
    assert memory.kept == kept
    with pytest.raises(ConfigError, match="no check nonsense") as caught:
        chosen(["usage", "nonsense"])
    assert "round-trip" in caught.value.hint


def test_after_ctrl_c_a_backup_that_a_thread_is_about_to_begin_is_cancelled_as_well(tmp_path: Path):
    bench = Bench(Target(driver=MemoryDriver()), tmp_path)
    begun, cancelled = Event(), Event()

    def first() -> None:
        with bench.context() as ctx, ctx.on_cancel(cancelled.set):
            begun.set()
            assert cancelled.wait(30)

    def second() -> bool:
        assert cancelled.wait(30)
        with bench.context() as ctx:
            return ctx.cancelled

    with pytest.raises(KeyboardInterrupt), bench.threads(2) as pool:
        pool.submit(first)
        later = pool.submit(second)
        assert begun.wait(30)
        raise KeyboardInterrupt
    assert later.result()
    with bench.context() as ctx:
        assert not ctx.cancelled, "what clears up afterwards is not"
