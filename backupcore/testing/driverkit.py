"""The kit for pytest: subclass `DriverKit`, give it one fixture, and get every check as a test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from backupcore.testing.bench import Bench
from backupcore.testing.checks import CHECKS, Check
from backupcore.testing.examination import Result, Verdict, look, not_made, ruled_out
from backupcore.testing.target import Target

__all__ = ["DriverKit"]


class DriverKit:
    """All checks of a driver.

    ::

        class TestFolder(DriverKit):
            @pytest.fixture
            def target(self, tmp_path: Path) -> Target:
                return Target(driver=Folder, options={"path": str(tmp_path)})

    The fixture may have any scope: the checks do not mind what else lies in the datastore. What they keep there is
    deleted after each of them, unless `tidy` is False, which spares time where the datastore is thrown away anyway. A
    check that does not apply passes, and says why in its output and in the report's property ``not_applicable``.

    Where the store is slow, `checks` may be some of `CHECKS`, with the rest in a class that runs less often; none may
    be left out for good. Where one fails on which all others stand, those are not made: one cause, one failure.
    """

    tidy: ClassVar[bool] = True
    checks: ClassVar[Sequence[Check]] = CHECKS
    _logged: ClassVar[list[str]] = []
    _told: ClassVar[list[str]] = []
    _unfit: ClassVar[list[str]] = []

    def __init_subclass__(cls) -> None:
        # What the checks of one class have heard is looked through for secrets by the last of them.
        cls._logged, cls._told, cls._unfit = [], [], []

    @pytest.fixture
    def target(self) -> Target:
        """What is examined: give your own."""
        raise NotImplementedError("give the fixture target: see backupcore.testing.Target")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """A test for each check of this class."""
        if "check" in metafunc.fixturenames:
            metafunc.parametrize("check", type(self).checks, ids=repr)

    def test_contract(
        self, target: Target, check: Check, tmp_path: Path, record_property: Callable[[str, object], None]
    ) -> None:
        """One check of the contract."""
        bench = Bench(target, tmp_path, logged=self._logged, told=self._told)
        result = not_made(check, self._unfit[0]) if self._unfit else self._look(check, bench)
        if result.verdict is Verdict.NOT_APPLICABLE:
            record_property("not_applicable", result.why)
            print(f"{check.name} does not apply: {result.why}")  # noqa: T201 - pytest shows it with -rP
        if result.verdict is Verdict.FAILED:
            pytest.fail(f"{result.title}:\n{result.why}", pytrace=False)

    def _look(self, check: Check, bench: Bench) -> Result:
        try:
            with bench.listening():
                result = look(check, bench)
        finally:
            if self.tidy:
                bench.clean_up()
        if why := ruled_out(check, result):
            self._unfit.append(why)
        return result
